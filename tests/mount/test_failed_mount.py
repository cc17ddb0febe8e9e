"""A mount that fails says why in one line, and a terminal gets sentences instead of log records."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import mounttable, skips
from tests.support.live import patch_children
from tests.support.stores import write_chain, write_tag

MOUNT = (sys.executable, "-m", "diffmergefs", "mount")
PLAIN = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
FAILED = 11
#: What is in the way, the command that brings it about, and the cause with its remedy.
IN_THE_WAY = {
    "right": (
        ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"),
        "root without CAP_SYS_ADMIN, the right to mount; give it that right: ",
    ),
    "device": (
        ("unshare", "-m", "sh", "-c", 'mount --bind /dev/null /dev/fuse && exec "$@"', "sh"),
        "/dev/fuse is another device; create it again: mknod ",
    ),
}


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


def on_terminal(command: Sequence[str | Path], until: str = "\0", then: str = "") -> list[str]:
    """The lines that the command prints on a terminal. Once `until` is there, `then` is run."""
    ours, theirs = os.openpty()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        text = b""
        try:
            while True:
                try:
                    chunk = os.read(ours, 1 << 16)
                except OSError:  # the last process that had it open has ended
                    break
                text += chunk
                if not chunk:
                    break
                if until.encode() in text and then:
                    subprocess.run(["umount", then], check=True, timeout=60)
                    then = ""
            process.wait(60)
        finally:
            process.kill()
            os.close(ours)
    return text.decode().replace("\r\n", "\n").splitlines()


@pytest.mark.parametrize("how", IN_THE_WAY)
@pytest.mark.parametrize("front", [False, True], ids=["background", "front"])
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_the_cause_comes_first_and_then_the_remedy(
    how: str, front: bool, terminal: bool, store: Path, mountpoint: Path
) -> None:
    skips.require_mounts()
    before, text = IN_THE_WAY[how]
    command = [*before, *MOUNT, *["-f"] * front, str(store), str(mountpoint)]
    if terminal:
        lines = on_terminal(command)
    else:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (FAILED, "")
        lines = done.stderr.splitlines()
    assert lines[-1].startswith(f"diffmergefs: {mountpoint}: cannot be mounted: {text}")
    if not front:
        assert len(lines) == 1
    if terminal:
        assert all(line.startswith("diffmergefs: ") for line in lines)
        assert not any(PLAIN.search(line) for line in lines)
    assert not mounttable.at(str(mountpoint))


def test_a_mount_in_front_of_a_terminal_prints_sentences(store: Path, mountpoint: Path) -> None:
    skips.require_fuse()
    write_tag(store, "orphan", "nobody")
    (store / "scratch").mkdir()
    command = [*MOUNT, "-f", str(store), str(mountpoint)]
    lines = on_terminal(command, "diffmergefs: ready", str(mountpoint))
    assert "diffmergefs: ready" in lines
    assert any(": orphan: not shown: " in line for line in lines)
    assert any(
        line.endswith("/scratch: passed over: no snapshot of the layout forkd") for line in lines
    )
    assert all(line.startswith("diffmergefs: ") for line in lines)
    assert not any(PLAIN.search(line) for line in lines)
    plain = on_terminal(
        [*command[:-2], "--log-format=plain", *command[-2:]], "ready", str(mountpoint)
    )
    assert all(PLAIN.match(line) for line in plain)


def test_warnings_at_the_start_are_sentences_for_the_caller(store: Path, mountpoint: Path) -> None:
    skips.require_fuse()
    write_tag(store, "orphan", "nobody")
    done = subprocess.run(
        [*MOUNT, "--log=/dev/null", store, mountpoint], capture_output=True, text=True, timeout=60
    )
    try:
        assert (done.returncode, done.stdout) == (0, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("diffmergefs: orphan: not shown: parent 'nobody' of 'orphan' is ")
    finally:
        mounttable.unmount_below(str(mountpoint))


def test_a_bug_of_the_daemon_shows_its_traceback(
    store: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_children(
        monkeypatch, tmp_path / "patch", "import diffmergefs.fuse.served as m\nm.Store.look = 1\n"
    )
    done = subprocess.run(
        [*MOUNT, "--log=/dev/null", store, mountpoint], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (70, "")
    assert done.stderr.startswith("diffmergefs: the daemon failed: this is a bug\n    Traceback ")
    assert "TypeError: 'int' object is not callable" in done.stderr.splitlines()[-1]
    assert not mounttable.at(str(mountpoint))
