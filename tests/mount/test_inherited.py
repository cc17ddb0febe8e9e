"""Started oddly: with closed streams, ignored or blocked signals, as some parents do it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.opening.images import open_image
from tests.support import mounttable, skips
from tests.support.images import PAGE, signed
from tests.support.live import until
from tests.support.processes import keeper_with, processes_with
from tests.support.stores import write_chain

NO_FILE = 14
MINE = [sys.executable, "-m", "diffmergefs"]
CLOSED = [which for n in (1, 2, 3) for which in itertools.combinations((0, 1, 2), n)]


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


def run(
    *arguments: object, closed: tuple[int, ...] = (), prepare: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command with these descriptors closed, and what `prepare` does before it is run."""
    closing = " ".join(f"{fd}>&-" for fd in closed)
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {closing}', "sh", *MINE, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        preexec_fn=prepare,
        timeout=90,
        cwd="/",
    )


@pytest.mark.parametrize("closed", CLOSED, ids=str)
def test_a_closed_stream_is_as_good_as_dev_null(closed: tuple[int, ...], store: Path) -> None:
    done = run("list", store, closed=closed)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("leaf" in done.stdout) == (1 not in closed)
    done = run("list", store / "none", closed=closed)
    assert done.returncode == NO_FILE and done.stdout == ""
    assert done.stderr.count("\n") == (2 not in closed)


@pytest.mark.parametrize("closed", CLOSED, ids=str)
def test_what_is_said_goes_into_no_file_that_is_being_written(
    closed: tuple[int, ...], store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run("flatten", "--allow-writers", store / "leaf", "-o", out, closed=closed)
    assert (done.returncode, done.stderr) == (0, "")
    image = out.read_bytes()
    assert image[PAGE : 2 * PAGE] == signed(1, PAGE, PAGE) and image[:PAGE] == signed(0, 0, PAGE)


@pytest.mark.parametrize("closed", CLOSED, ids=str)
def test_a_mount_comes_up_with_closed_streams(
    closed: tuple[int, ...], store: Path, mountpoint: Path
) -> None:
    done = run("mount", "--log", "/dev/null", store, mountpoint, closed=closed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    try:
        image = (mountpoint / "leaf" / "memory.bin").read_bytes()
        assert image[PAGE : 2 * PAGE] == signed(1, PAGE, PAGE)
    finally:
        assert run("umount", mountpoint, closed=closed).returncode == 0


def ignore_children() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def block_all() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


ODD = pytest.mark.parametrize("prepare", [ignore_children, block_all])


@ODD
def test_children_are_waited_for(
    prepare: Callable[[], None], store: Path, public_path: Path, mountpoint: Path
) -> None:
    done = run("doctor", prepare=prepare)
    assert done.returncode == 0 and "pyfuse3 3." in done.stdout
    layers = [store / tag / "memory.bin" for tag in ("base", "leaf")]
    assert run("compare", "--jobs", "2", *layers, prepare=prepare).returncode == 1
    done = run("mount", store, public_path / "none", prepare=prepare)
    assert done.returncode == 10 and "No such file or directory" in done.stderr
    done = run("demo", prepare=prepare)
    assert (done.returncode, done.stderr) == (0, "")


@ODD
@pytest.mark.parametrize("front", [True, False], ids=["front", "background"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_mount_can_be_stopped(
    prepare: Callable[[], None],
    front: bool,
    number: signal.Signals,
    store: Path,
    mountpoint: Path,
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    options = ["-f"] if front else []
    command = [*MINE, "mount", *options, "--log", str(log), str(store), str(mountpoint)]
    process = subprocess.Popen(command, preexec_fn=prepare)
    try:
        until(lambda: log.exists() and "ready" in log.read_text(), "it is not ready")
        assert front or process.wait(60) == 0
        pid = process.pid if front else keeper_with(mountpoint)
        os.kill(pid, number)
        until(lambda: not mounttable.at(str(mountpoint)), "it was not detached")
        assert not front or process.wait(60) == 0
        until(lambda: not processes_with(mountpoint), "it did not end")
    finally:
        for pid in processes_with(mountpoint):
            os.kill(pid, signal.SIGKILL)
        process.wait(60)


WITHOUT_PROC = ["unshare", "--mount", "/bin/sh", "-c", 'umount -l /proc && exec "$@"', "sh"]
NO_PROC = "diffmergefs: /proc is not mounted, and no file can be opened without it: mount -t"


def test_a_fuse_device_that_its_caller_left_open_is_not_taken_for_its_own(
    store: Path, mountpoint: Path, tmp_path: Path
) -> None:
    skips.require_fuse()
    log = tmp_path / "log"
    other = os.open("/dev/fuse", os.O_RDWR)
    command = [*MINE, "mount", "-f", "--log", str(log), str(store), str(mountpoint)]
    process = subprocess.Popen(command, pass_fds=(other,))
    try:
        until(lambda: log.exists() and "ready" in log.read_text(), "it is not ready")
        image = (mountpoint / "leaf" / "memory.bin").read_bytes()
        assert image[PAGE : 2 * PAGE] == signed(1, PAGE, PAGE)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        os.close(other)
        for pid in processes_with(mountpoint):
            os.kill(pid, signal.SIGKILL)
        process.wait(60)
        mounttable.unmount_below(str(mountpoint))


@pytest.mark.parametrize(
    "command",
    [
        "list S",
        "info S/leaf",
        "flatten S/leaf -o S/../out",
        "info --base S/base/memory.bin --diff S/leaf/memory.bin",
        "verify S/leaf",
        "mount -f S M",
        "mount -f --base S/base/memory.bin M",
        "umount M",
        "status M",
        "demo",
    ],
)
def test_without_proc_there_is_one_clear_line(command: str, store: Path, mountpoint: Path) -> None:
    skips.require_mounts()
    words = [w.replace("S", str(store)).replace("M", str(mountpoint)) for w in command.split()]
    done = subprocess.run(
        [*WITHOUT_PROC, *MINE, *words], capture_output=True, text=True, timeout=90, cwd="/"
    )
    assert done.returncode == 13, done
    assert done.stderr.startswith(NO_PROC) and done.stderr.count("\n") == 1
    assert "leaf" not in done.stdout


def test_without_proc_a_layer_is_refused_with_the_reason(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for who imports the package."""
    real = os.open

    def without(path: str, *rest: int, **options: int) -> int:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", without)
    with pytest.raises(DiffMergeError, match="/proc is not mounted"):
        open_image(store / "leaf")
