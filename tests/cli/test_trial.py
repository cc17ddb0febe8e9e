"""The verb doctor where a mount is possible."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.commands import diffmergefs
from tests.support.subjects.doctor import memory, store

__all__ = ["store"]


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
