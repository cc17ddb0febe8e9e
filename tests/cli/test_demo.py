"""The verb demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import mounttable, skips


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_demo_does_it_all_and_leaves_nothing(tmp_path: Path, option: list[str]) -> None:
    skips.require_fuse()
    # Not by `python -m`: then root believes no TMPDIR.
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from diffmergefs import cli; sys.exit(cli.main(sys.argv[1:]))",
            "demo",
            *option,
        ],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    if option:
        found = json.loads(done.stdout)
        assert found["ok"] is True
        steps = found["steps"]
    else:
        steps = done.stdout.splitlines()
    words = ["made", "mounted", "read", "flattened", "unmounted"]
    assert len(steps) == len(words)
    assert all(word in step for word, step in zip(words, steps, strict=True))
    assert os.listdir(tmp_path) == []
    assert not [entry for entry in mounttable.entries() if entry.path.startswith(str(tmp_path))]


FAILING = """
import sys
from diffmergefs import cli
from diffmergefs.cli import demo

held = []

def failing(path, expected):
    held.append(open(path, "rb"))
    raise OSError(5, "Input/output error", "probe")

demo._require_equal = failing
sys.exit(cli.main(["demo"]))
"""


def test_a_demo_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Not even where somebody has a file of its view open."""
    skips.require_fuse()
    done = subprocess.run(
        [sys.executable, "-c", FAILING],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (14, "diffmergefs: probe: Input/output error\n")
    assert os.listdir(tmp_path) == []
    assert not [entry for entry in mounttable.entries() if entry.path.startswith(str(tmp_path))]
    assert not processes_that_name(tmp_path)


def processes_that_name(path: Path) -> list[str]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.fsencode(path) in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(name)
    return found
