"""The verb verify."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.live import Gate, patch_children
from tests.support.stores import (
    SIZE,
    write_chain,
    write_tag,
)
from tests.support.subjects.verify import ABSENT, hash_of, root, state

__all__ = ["root", "state"]


def test_the_command_has_a_summary_or_a_line_for_each_fault(root: Path, state: Path) -> None:
    option = f"--state-dir={state}"
    assert (
        succeed("verify", option, root / "leaf")
        == f"sound: 3 layers of {SIZE} bytes; pins verified: 2\n"
    )
    write_tag(root, "free", "leaf", layer=3)
    assert succeed("verify", option, root / "free").splitlines() == [
        f"sound: 4 layers of {SIZE} bytes; pins verified: 2",
        "unpinned: no hash of their parents is recorded in free",
    ]
    write_tag(root, "leaf", "work", layer=2, parent_content_hash=ABSENT)
    (root / "base").rename(root.parent / "away")
    done = diffmergefs("verify", option, root / "free")
    assert (done.returncode, done.stderr) == (1, "")
    missing, wrong = done.stdout.splitlines()
    assert missing == "parent 'base' of 'work' is missing"
    assert hash_of(root / "work") in wrong and ABSENT in wrong


def test_the_command_speaks_json(root: Path, state: Path) -> None:
    write_tag(root, "leaf", "work", layer=2, parent_content_hash=ABSENT)
    done = diffmergefs("verify", "--json", "--jobs=1", f"--state-dir={state}", root / "leaf")
    facts = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (1, "")
    assert set(facts) == {"sound", "layers", "faults", "overridden", "hints"}
    assert facts["sound"] is False
    layer = {
        "tag": "work",
        "path": f"{root}/work/memory.bin",
        "size": SIZE,
        "pin": "verified",
        "seal": None,
    }
    assert facts["layers"][1] == layer
    assert [set(fault) for fault in facts["faults"]] == [{"kind", "message"}]


def test_the_command_names_few_of_many_unpinned(tmp_path: Path) -> None:
    tags = [f"t{n}" for n in range(12)]
    write_chain(tmp_path, tags)
    line = succeed("verify", tmp_path / tags[-1]).splitlines()[1]
    assert line.endswith("in t1, t2, t3, t4, t5, t6, t7, t8 and 3 more")


def test_the_command_takes_explicit_layers_and_tells_overrides(root: Path) -> None:
    base, work = (root / tag / "memory.bin" for tag in ("base", "work"))
    assert succeed("verify", "--base", base, "--diff", work).startswith("sound: 2 layers")
    done = diffmergefs(
        "verify", "--base", base, "--diff", work, "--page-size=8192", "--trust-grain"
    )
    assert done.returncode == 0
    assert done.stderr.startswith("diffmergefs: --trust-grain overrides the check of alignment")


def test_a_users_mistakes(root: Path) -> None:
    assert "No such file" in mistake(14, "verify", root / "nobody")
    assert diffmergefs("verify").returncode == 2
    assert diffmergefs("verify", "--jobs=0", root / "leaf").returncode == 2
    assert diffmergefs("verify", "--state-dir=", root / "leaf").returncode == 2


def test_an_interrupt_ends_it_at_once(
    root: Path, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After it, each thread may finish one block and no more.
    gate = Gate(tmp_path / "gate")
    code = gate.code + (
        "import diffmergefs.opening.pins as pins\n"
        "def endless(layer, report):\n"
        "    wait_at_gate()\n"
        "    while True:\n"
        "        report(1)\n"
        "pins.content_hash = endless\n"
    )
    patch_children(monkeypatch, tmp_path / "patch", code)
    command = [sys.executable, "-m", "diffmergefs", "verify", f"--state-dir={state}"]
    process = subprocess.Popen(
        [*command, str(root / "leaf")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        gate.wait_until_reached()
        gate.open()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (128 + signal.SIGTERM, "", "")
    finally:
        gate.open()
        process.kill()
        process.communicate()
