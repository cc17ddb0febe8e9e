"""The verbs demo and doctor where a mount is possible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import mounttable, skips
from tests.support.commands import diffmergefs
from tests.support.subjects.doctor import memory, store

__all__ = ["store"]


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
from diffmergefs.cli import trial

held = []

def failing(path, expected):
    held.append(open(path, "rb"))
    raise OSError(5, "Input/output error", "probe")

trial._require_equal = failing
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


def test_the_command_says_it_all_and_ends_with_1(store: Path, tmp_path: Path) -> None:
    harmed = memory(store, "work")
    harmed.write_bytes(harmed.read_bytes())
    done = diffmergefs("doctor", tmp_path / "nowhere", store)
    assert done.returncode == 1
    assert done.stderr == f"diffmergefs: {tmp_path}/nowhere: No such file or directory\n"
    assert done.stdout.startswith("host\n  fine     Linux ")
    lines = done.stdout.splitlines()
    at = lines.index(str(harmed)) + 1
    assert lines[at].startswith("  wrong    no hole, and of 15 pages ")
    assert lines[at + 1].startswith("           why: ")
    assert lines[at + 2].startswith("           remedy: take the diff again")
    assert lines[-1].startswith("1 wrong, ")


def test_the_command_prints_json(store: Path) -> None:
    done = diffmergefs("doctor", "--json", store)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert {"subject", "check", "severity", "finding", "why", "remedy"} == set(found[0])
    assert found[0]["subject"] == "host"
    assert {f["subject"] for f in found} > {str(store), str(memory(store, "work"))}


def test_warnings_are_no_failure_and_a_path_that_is_missing_is(tmp_path: Path) -> None:
    done = diffmergefs("doctor")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("0 wrong, ")
    assert diffmergefs("doctor", tmp_path / "nowhere").returncode == 14
