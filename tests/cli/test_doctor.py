"""The verb doctor where a mount is possible."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.commands import diffmergefs, diffmergefs_as_nobody
from tests.support.stores import write_chain
from tests.support.subjects.doctor import memory, store

__all__ = ["store"]


def test_the_command_says_it_all_and_ends_with_1(store: Path, tmp_path: Path) -> None:
    harmed = memory(store, "work")
    harmed.write_bytes(harmed.read_bytes())
    done = diffmergefs("doctor", tmp_path / "nowhere", store)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"diffmergefs: {tmp_path}/nowhere: No such file or directory; check its name\n"
    )
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


def test_each_filesystem_and_each_layer_is_printed_once(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    done = diffmergefs("doctor", store, other, store / "work", memory(store, "work"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n  fine     a filesystem of type ") == 1
    subjects = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert len(subjects) == len(set(subjects))
    assert {str(store), str(other), str(memory(store, "work"))} < set(subjects)
    found = json.loads(diffmergefs("doctor", "--json", store, store, other).stdout)
    assert [f["subject"] for f in found if f["check"] == "filesystem"] == [str(store)]


def test_a_filesystem_is_tested_where_it_can_be_written(public_path: Path) -> None:
    write_chain(public_path / "store", ["base"])
    own = public_path / "own"
    own.mkdir(mode=0o777)
    own.chmod(0o777)
    done = diffmergefs_as_nobody("doctor", "--json", public_path / "store", own)
    checks = [(f["subject"], f["check"]) for f in json.loads(done.stdout)]
    assert (str(public_path / "store"), "probe") in checks and (str(own), "grain") in checks
