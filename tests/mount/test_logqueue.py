"""A log that nobody waits for: full, failing and stuck ones."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import mounttable
from tests.support.commands import diffmergefs
from tests.support.live import until
from tests.support.stores import write_chain


@pytest.mark.parametrize("log_format", ["plain", "json", "journald"])
def test_a_mount_does_not_wait_for_its_stderr(
    log_format: str, public_path: Path, mountpoint: Path
) -> None:
    """Not before it is up, nor while it serves, nor at its end."""
    store = write_chain(public_path / "store", ["base", "leaf"])
    reader, writer = os.pipe()
    os.write(writer, b"." * fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ))
    command = [sys.executable, "-m", "diffmergefs", "mount", "-f", "--log-format", log_format]
    process = subprocess.Popen([*command, str(store), str(mountpoint)], stderr=writer)
    try:
        until(lambda: mounttable.at(str(mountpoint)), "it is not mounted")
        assert sorted(os.listdir(mountpoint)) == ["base", "leaf"]
        assert (mountpoint / "leaf" / "memory.bin").read_bytes()
        assert diffmergefs("umount", mountpoint).returncode == 0
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(60)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_a_mount_that_fails_does_not_wait_either(log_format: str, public_path: Path) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    reader, writer = os.pipe()
    os.write(writer, b"." * fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ))
    command = [sys.executable, "-m", "diffmergefs", "mount", "-f", "--log-format", log_format]
    process = subprocess.Popen([*command, str(store), str(public_path / "none")], stderr=writer)
    try:
        assert process.wait(60) == 10
    finally:
        process.kill()
        process.wait(60)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("front", [True, False], ids=["front", "background"])
def test_a_log_file_that_hangs_holds_nobody_up(
    front: bool, public_path: Path, mountpoint: Path
) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    log = public_path / "log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    filler = os.open(log, os.O_WRONLY)
    os.write(filler, b"." * fcntl.fcntl(filler, fcntl.F_GETPIPE_SZ))
    try:
        if front:
            command = [sys.executable, "-m", "diffmergefs", "mount", "-f", "--log", str(log)]
            process = subprocess.Popen([*command, str(store), str(mountpoint)])
            until(lambda: mounttable.at(str(mountpoint)), "it is not mounted")
        else:
            assert diffmergefs("mount", "--log", log, store, mountpoint).returncode == 0
        assert sorted(os.listdir(mountpoint)) == ["base", "leaf"]
        assert diffmergefs("umount", mountpoint).returncode == 0
        if front:
            assert process.wait(60) == 0
    finally:
        os.close(reader)
        os.close(filler)


def test_the_log_is_whole_when_the_command_has_ended(public_path: Path, mountpoint: Path) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    log = public_path / "log"
    command = [sys.executable, "-m", "diffmergefs", "mount", "-f", "--log", str(log)]
    with subprocess.Popen([*command, str(store), str(mountpoint)]) as process:
        until(lambda: log.exists() and "ready\n" in log.read_text(), "it is not ready")
        process.terminate()
        assert process.wait(60) == 0
    assert "SIGTERM: detached; 0 files are open" in log.read_text()
