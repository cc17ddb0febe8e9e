"""The verbs verify and seal, of an image and of a whole directory of snapshots."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.images import signed, write_layer
from tests.support.live import Gate
from tests.support.stores import SIZE, pages, write_chain, write_numbered, write_tag
from tests.support.subjects.filled import filled_store
from tests.support.subjects.verify import ABSENT, hash_of, root, state

__all__ = ["root", "state"]


def test_the_command_has_a_summary_or_a_line_for_each_fault(root: Path, state: Path) -> None:
    option = f"--state-dir={state}"
    assert (
        succeed("verify", option, root / "leaf")
        == f"sound: 3 layers of {SIZE} bytes (64 KiB); pins verified: 2\n"
    )
    write_tag(root, "free", "leaf", layer=3)
    assert succeed("verify", option, root / "free").splitlines() == [
        f"sound: 4 layers of {SIZE} bytes (64 KiB); pins verified: 2",
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
    code = (
        "import diffmergefs.opening.pins as pins\n"
        "def endless(layer, report):\n"
        "    wait_at_gate()\n"
        "    while True:\n"
        "        report(1)\n"
        "pins.content_hash = endless\n"
    )
    gate.patch(monkeypatch, code)
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


# A whole directory of snapshots


def test_verify_of_a_store_has_a_line_for_each_snapshot(root: Path, state: Path) -> None:
    option = f"--state-dir={state}"
    write_tag(root, "free", "leaf", layer=3)
    layers = [f"sound, {n} layers of {SIZE} bytes (64 KiB)" for n in range(5)]
    assert succeed("verify", option, root).splitlines() == [
        f"base: sound, 1 layer of {SIZE} bytes (64 KiB)",
        f"work: {layers[2]}",
        f"leaf: {layers[3]}",
        f"free: {layers[4]}, unpinned",
        "4 snapshots: 4 sound, 0 not",
    ]
    write_tag(root, "work", "base", layer=1, parent_content_hash=ABSENT)
    write_tag(root, "orphan", "nobody", layer=5)
    done = diffmergefs("verify", option, "--jobs=1", root)
    assert (done.returncode, done.stderr) == (1, "")
    base, orphan, work, leaf, free, total = done.stdout.splitlines()
    assert base == f"base: sound, 1 layer of {SIZE} bytes (64 KiB)"
    assert orphan == "orphan: parent 'nobody' of 'orphan' is missing"
    assert work.startswith("work: ") and ABSENT in work
    assert leaf == "leaf: not sound, because 'work' is not"
    assert free == "free: not sound, because 'work' is not"
    assert total == "5 snapshots: 1 sound, 4 not"
    facts = json.loads(diffmergefs("verify", option, "--json", root).stdout)
    assert [(f["tag"], f["sound"], len(f["layers"])) for f in facts] == [
        ("base", True, 1),
        ("orphan", False, 1),
        ("work", False, 2),
        ("leaf", False, 3),
        ("free", False, 4),
    ]


def test_verify_of_a_store_of_another_suffix_or_of_two_layouts(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.ram", "001-work.ram"])
    assert "--suffix .ram" in mistake(3, "verify", tmp_path)
    assert succeed("verify", "--suffix=ram", tmp_path).endswith("2 snapshots: 2 sound, 0 not\n")
    write_tag(tmp_path, "native")
    assert "--layout" in mistake(3, "verify", "--suffix=ram", tmp_path)
    assert "native: sound" in succeed("verify", "--layout=forkd", tmp_path)
    done = diffmergefs("verify", "--layout=forkd", "--base", tmp_path / "000-base.ram")
    assert done.returncode == 2 and "--layout and --suffix go with SOURCE" in done.stderr


def test_seal_of_a_store_seals_each_layer_over_its_parents(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "work", "leaf"])
    write_layer(store / "base" / "memory.bin", SIZE, pages(0, range(16)))  # no hole
    found = json.loads(succeed("seal", "--json", "--jobs=2", store))
    assert [(each["path"], each["outcome"]) for each in found] == [
        (f"{store}/{tag}/memory.bin.bmap", "written") for tag in ("base", "leaf", "work")
    ]
    for tag in ("base", "work", "leaf"):
        layer = store / tag / "memory.bin"
        assert (layer.parent / "memory.bin.bmap").stat().st_mode == layer.stat().st_mode
    rows = succeed("seal", store).splitlines()
    assert [row.split()[1] for row in rows] == ["DONE", *["unchanged"] * 3]
    assert succeed("verify", store / "leaf").startswith("sound: 3 layers")
    facts = json.loads(succeed("info", "--json", store / "leaf"))
    assert [layer["trust"] for layer in facts["layers"]] == ["sealed"] * 3


def test_seal_of_a_store_goes_on_after_a_failure(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "work", "leaf"])
    write_tag(store, "orphan", "nobody", layer=4)
    harmed = store / "work" / "memory.bin"
    harmed.write_bytes(harmed.read_bytes())
    write_tag(store, "other", "base", layer=5)
    done = diffmergefs("seal", store)
    assert done.returncode == 1
    leaf, orphan, work = sorted(done.stderr.splitlines())
    assert leaf.startswith("diffmergefs: leaf: ") and "work/memory.bin: looks like a diff" in leaf
    assert orphan == "diffmergefs: orphan: parent 'nobody' of 'orphan' is missing"
    assert work.startswith(f"diffmergefs: work: {harmed}: looks like a diff whose holes were fill")
    assert sorted(path.parent.name for path in store.rglob("*.bmap")) == ["base", "other"]
    assert [row.split()[1] for row in done.stdout.splitlines()] == ["DONE", "written", "written"]


def test_seal_of_a_store_accepts_a_complete_image_and_numbered_layers(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "work"])
    full = write_tag(store, "full", "work", layer=4, numbers=range(16)) / "memory.bin"
    write_layer(full, SIZE, [(0, signed(0, 0, SIZE)), *pages(4, range(12))])
    assert len(succeed("seal", store).splitlines()) == 4
    layers = write_numbered(tmp_path / "layers", ["000-base.mem", "001-work.mem"])
    assert len(succeed("seal", layers).splitlines()) == 3
    assert succeed("list", layers).count("complete") == 2


def test_seal_of_a_store_follows_no_symlink_in_it(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "work"])
    (store / "work").rename(tmp_path / "outside")
    (store / "work").symlink_to(tmp_path / "outside")
    assert len(succeed("seal", store).splitlines()) == 2
    assert not list((tmp_path / "outside").glob("*.bmap"))


def test_seal_of_a_store_tells_what_looks_filled_and_refuses_it_if_strict(tmp_path: Path) -> None:
    tags = filled_store(tmp_path, 2)
    done = diffmergefs("seal", "--strict", tmp_path)
    assert done.returncode == 1
    assert [path.parent.name for path in tmp_path.rglob("*.bmap")] == ["base"]
    done = diffmergefs("seal", tmp_path)
    assert done.returncode == 0
    assert [line.count("looks as if holes were filled") for line in done.stderr.splitlines()] == [
        1
    ] * 2
    assert sorted(path.parent.name for path in tmp_path.rglob("*.bmap")) == ["base", *tags]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{store}", "{store}"], "is sealed alone"),
        (["--base", "{layer}", "{store}"], "is sealed alone"),
        (["{store}/work"], "is one snapshot; name its memory file"),
        (["--jobs=2", "{layer}"], "--jobs needs a directory of snapshots"),
        (["--layout=forkd", "{layer}"], "--layout needs a directory of snapshots"),
        ([], "name the layers to seal"),
    ],
)
def test_a_wrong_use_of_seal(arguments: list[str], text: str, tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "work"])
    layer = store / "work" / "memory.bin"
    done = diffmergefs("seal", *(a.format(store=store, layer=layer) for a in arguments))
    assert done.returncode == 2 and text in done.stderr
    assert not list(store.rglob("*.bmap"))
