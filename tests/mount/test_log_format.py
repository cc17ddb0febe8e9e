"""--log-format: what becomes of a record, and which format `auto` is where."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import mounttable
from tests.support.commands import diffmergefs
from tests.support.stores import write_chain, write_tag

PLAIN = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ diffmergefs[.\w]*: ")


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


def log_in_front(store: Path, mountpoint: Path, *options: str, journal: bool = False) -> str:
    """All that a mount in front says on stderr, from its start to its end by umount(8)."""
    path = mountpoint.parent / "stderr"
    with path.open("w+") as err:
        status = os.fstat(err.fileno())
        environment = dict(os.environ)
        if journal:
            environment["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "diffmergefs",
            "mount",
            "-f",
            *options,
            store,
            mountpoint,
        ]
        with subprocess.Popen(command, stderr=err, env=environment) as process:
            try:
                while not mounttable.at(str(mountpoint)):
                    assert process.poll() is None, path.read_text()
                os.listdir(mountpoint)
                subprocess.run(["umount", mountpoint], check=True, timeout=60)
                assert process.wait(20) == 0
            finally:
                process.kill()
    return path.read_text()


def test_auto_is_journald_in_the_journal(store: Path, mountpoint: Path) -> None:
    write_tag(store, "orphan", "nobody")
    lines = log_in_front(store, mountpoint, journal=True).splitlines()
    assert "<6>diffmergefs.fuse.session: ready" in lines
    (line,) = [line for line in lines if "orphan: not shown: " in line]
    assert line.startswith("<4>diffmergefs")
    assert all(re.match(r"<[2-7]>diffmergefs", line) for line in lines)


def test_auto_is_plain_elsewhere(store: Path, mountpoint: Path) -> None:
    lines = log_in_front(store, mountpoint).splitlines()
    assert lines and all(PLAIN.match(line) for line in lines)


@pytest.mark.parametrize("named", ["plain", "journald", "json"])
def test_a_named_format_counts_whatever_stderr_is(
    named: str, store: Path, mountpoint: Path
) -> None:
    journal = named != "journald"
    text = log_in_front(store, mountpoint, f"--log-format={named}", journal=journal)
    lines = text.splitlines()
    if named == "json":
        assert "ready" in [json.loads(line)["message"] for line in lines]
    else:
        pattern = PLAIN if named == "plain" else re.compile(r"<[2-7]>diffmergefs")
        assert lines and all(pattern.match(line) for line in lines)


@pytest.mark.parametrize("named", ["auto", "json", "journald"])
def test_the_log_file_of_a_background_daemon(named: str, store: Path, mountpoint: Path) -> None:
    log = mountpoint.parent / "log"
    done = diffmergefs("mount", f"--log={log}", f"--log-format={named}", store, mountpoint)
    try:
        assert (done.returncode, done.stderr) == (0, ""), done
    finally:
        assert diffmergefs("umount", mountpoint).returncode == 0
    lines = log.read_text().splitlines()
    match named:
        case "auto":
            assert lines and all(PLAIN.match(line) for line in lines)
        case "json":
            assert "ready" in [json.loads(line)["message"] for line in lines]
        case "journald":
            assert "<6>diffmergefs.fuse.session: ready" in lines


@pytest.mark.parametrize("named", ["json", "journald"])
def test_a_failure_at_the_start_is_a_record_too(
    named: str, public_path: Path, mountpoint: Path
) -> None:
    missing = public_path / "none"
    done = diffmergefs("mount", "-f", f"--log-format={named}", missing, mountpoint)
    assert done.returncode == 14
    text = f"{missing}: No such file or directory; check its name"
    if named == "json":
        found = json.loads(done.stderr)
        assert (found["level"], found["message"]) == ("error", text)
    else:
        assert done.stderr == f"<3>diffmergefs: {text}\n"


def test_an_unknown_format_is_bad_usage(store: Path, mountpoint: Path) -> None:
    assert diffmergefs("mount", "--log-format=xml", store, mountpoint).returncode == 2
