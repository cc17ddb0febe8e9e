"""`mount` without -f: it returns when the mount answers, or says why it did not come up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs import daemon
from tests.support import mounttable
from tests.support.images import PAGE, signed, write_layer
from tests.support.live import Gate, patch_children, until
from tests.support.stores import OLD_NS, age, pages, write_chain

SIZE_MISMATCH, UNTRUSTED, REFUSED, FAILED, TIMEOUT, NO_FILE = 4, 5, 10, 11, 12, 14
USAGE = 2


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


def run(*arguments: object, cwd: Path | str = "/") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffmergefs", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=90, cwd=cwd
    )


def is_mounted(path: Path) -> bool:
    return bool(mounttable.at(str(path)))


def daemons_of(path: Path) -> list[int]:
    """The processes that have this path among their arguments."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            arguments = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(path) in arguments:
            found.append(int(name))
    return found


def end(path: Path) -> None:
    assert run("umount", path).returncode == 0
    until(lambda: not daemons_of(path), "the daemon did not end")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.splitlines()[-1]


def test_it_returns_when_the_mount_answers(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = run("mount", "--log", log, store, mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (mountpoint / "leaf" / "memory.bin").read_bytes()[PAGE:][:PAGE] == signed(1, PAGE, PAGE)
    (pid,) = daemons_of(mountpoint)
    proc = Path(f"/proc/{pid}")
    assert os.readlink(proc / "cwd") == "/"
    assert [os.readlink(proc / "fd" / str(n)) for n in range(3)] == [os.devnull] * 3
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    parent, session, terminal = int(fields[1]), int(fields[3]), int(fields[4])
    assert parent != os.getpid() and session == pid and terminal == 0
    os.truncate(store / "leaf" / "memory.bin", PAGE)
    until(lambda: "leaf: not shown: leaf/memory.bin: 4096 bytes" in log.read_text(), "no log")
    os.kill(pid, signal.SIGTERM)
    until(lambda: not daemons_of(mountpoint), "the daemon did not end")
    assert not is_mounted(mountpoint)
    text = log.read_text()
    assert " INFO diffmergefs.mount: ready\n" in text and "SIGTERM: detached" in text
    assert "Traceback" not in text


def test_relative_paths(store: Path, mountpoint: Path) -> None:
    folder = mountpoint.parent
    done = run("mount", "--log", "here.log", "store", "mnt", cwd=folder)
    assert done.returncode == 0
    try:
        assert sorted(os.listdir(mountpoint)) == ["base", "leaf"]
        assert "ready" in (folder / "here.log").read_text()
    finally:
        assert run("umount", "mnt", cwd=folder).returncode == 0
    layers = ["--base", "store/base/memory.bin", "--diff", "store/leaf/memory.bin"]
    assert run("mount", *layers, "mnt", cwd=folder).returncode == 0
    try:
        view = (mountpoint / "memory.bin").read_bytes()
        assert view[PAGE : 2 * PAGE] == signed(1, PAGE, PAGE)
    finally:
        assert run("umount", "mnt", cwd=folder).returncode == 0


def test_a_helper_that_lives_on_holds_nobody_up(store: Path, mountpoint: Path) -> None:
    """auto_unmount leaves a fusermount3 behind, which holds the daemon's stderr open."""
    done = run("mount", "-o", "auto_unmount", "--timeout", "20", store, mountpoint)
    assert done.returncode == 0
    assert sorted(os.listdir(mountpoint)) == ["base", "leaf"]
    end(mountpoint)


def missing(folder: Path) -> list[object]:
    return [folder / "missing"]


def sizes(folder: Path) -> list[object]:
    other = write_layer(folder / "other", 3 * PAGE, pages(1, [1]))
    return ["--base", folder / "store" / "base" / "memory.bin", "--diff", other]


def untrusted(folder: Path) -> list[object]:
    base = folder / "store" / "base" / "memory.bin"
    diff = write_layer(folder / "diff", base.stat().st_size, pages(1, [1]))
    with diff.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 5 * PAGE, PAGE)
    return ["--base", base, "--diff", diff]


def ambiguous(folder: Path) -> list[object]:
    age(write_layer(folder / "store" / "000-other.mem", PAGE, pages(0, [0])))
    return [folder / "store"]


# Which of the three kinds of file systems the temporary directory is on decides by which check.
FAILURES: dict[str, tuple[Callable[[Path], list[object]], int, str]] = {
    "missing": (missing, NO_FILE, "/missing: No such file or directory"),
    "sizes": (sizes, SIZE_MISMATCH, f"/other: {3 * PAGE} bytes, but "),
    "ambiguous": (ambiguous, 3, "say which is meant with --layout"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_the_callers(
    failure: str, store: Path, public_path: Path, mountpoint: Path
) -> None:
    arguments, code, text = FAILURES[failure]
    done = run("mount", *arguments(public_path), mountpoint)
    assert done.returncode == code, done.stderr
    assert last_line(done).startswith("diffmergefs: /") and text in last_line(done)
    assert "Traceback" not in done.stderr
    assert not is_mounted(mountpoint) and not daemons_of(mountpoint)


def test_an_untrusted_diff(filesystem: Callable[[str], Path], mountpoint: Path) -> None:
    folder = filesystem("ext4")
    write_chain(folder / "store", ["base"])
    done = run("mount", *untrusted(folder), mountpoint)
    assert done.returncode == UNTRUSTED, done.stderr
    assert "is preallocated and unwritten" in last_line(done)
    done = run("mount", "--trust-grain", *untrusted(folder), mountpoint)
    assert done.returncode == 0
    try:
        assert "--trust-grain overrides the check of unwritten" in done.stderr
    finally:
        end(mountpoint)


def test_a_mountpoint_in_use(store: Path, mountpoint: Path) -> None:
    assert run("mount", store, mountpoint).returncode == 0
    try:
        done = run("mount", store, mountpoint)
        assert done.returncode == REFUSED
        assert last_line(done) == f"diffmergefs: {mountpoint}: {store} is mounted there already"
        assert sorted(os.listdir(mountpoint)) == ["base", "leaf"]
        assert len(mounttable.at(str(mountpoint))) == 1
    finally:
        end(mountpoint)


@pytest.mark.parametrize("option", ["rw", "max_read=4096", "fsname=x", "fd=3", "no_such_option"])
def test_options_that_are_refused(option: str, store: Path, mountpoint: Path) -> None:
    done = run("mount", "-o", f"noatime,{option}", store, mountpoint)
    assert done.returncode == FAILED
    assert not is_mounted(mountpoint) and not daemons_of(mountpoint)


@pytest.mark.parametrize("option", ["page_size=5000", "page_size=x", "layout=none"])
def test_our_own_options_are_checked(option: str, store: Path, mountpoint: Path) -> None:
    done = run("mount", "-o", option, store, mountpoint)
    assert done.returncode == USAGE
    name, _, value = option.partition("=")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert name.replace("_", "-") in line and value in line


def test_the_log_file_cannot_be_written(store: Path, mountpoint: Path) -> None:
    log = store / "missing" / "log"
    done = run("mount", "--log", log, store, mountpoint)
    assert done.returncode == NO_FILE
    assert last_line(done) == f"diffmergefs: {log}: cannot log there: No such file or directory"
    assert not is_mounted(mountpoint) and not daemons_of(mountpoint)


@pytest.mark.parametrize("where", ["look", "mounted"])
def test_a_mount_that_does_not_come_up(
    where: str,
    store: Path,
    public_path: Path,
    mountpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In time: no process and no mount is left, whether it hangs before or after it mounted."""
    gate = Gate(public_path / "gate")
    code = gate.code + "import signal\n"
    if where == "look":
        code += "import diffmergefs.store as module\nmodule.Store.look = lambda s: wait_at_gate()\n"
    else:
        code += (
            "import os, pyfuse3\n"
            "real = pyfuse3.init\n"
            "def init(*args):\n"
            "    real(*args)\n"
            "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "    wait_at_gate()\n"
            "pyfuse3.init = init\n"
        )
    patch_children(monkeypatch, public_path / "patch", code)
    try:
        done = run("mount", "--timeout", "2", "store", "mnt", cwd=public_path)
    finally:
        gate.open()
    assert done.returncode == TIMEOUT
    assert f"{mountpoint}: the mount did not answer within 2 s" in last_line(done)
    assert not is_mounted(mountpoint) and not daemons_of(mountpoint)


def test_start_tells_how_a_child_went() -> None:
    def says_and_fails(ready: Callable[[], None]) -> int:
        os.write(2, b"first\nlast")
        return 9

    def ends_without_a_word(ready: Callable[[], None]) -> int:
        return 0

    def is_killed(ready: Callable[[], None]) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def never_ready(ready: Callable[[], None]) -> int:
        os.write(2, b"so far")
        signal.pause()
        return 0

    def is_ready(ready: Callable[[], None]) -> int:
        os.write(2, b"w" * 200_000)
        ready()
        os.write(2, b"never seen")
        return 3

    assert daemon.start(says_and_fails, 30) == (9, "first\nlast")
    assert daemon.start(ends_without_a_word, 30).status not in (0, None)
    assert daemon.start(is_killed, 30) == (-signal.SIGKILL, "")
    assert daemon.start(is_ready, 30) == (0, "w" * 200_000)
    assert daemon.start(never_ready, 0.2) == (None, "so far")


def test_a_mount_right_after_the_snapshot(store: Path, mountpoint: Path) -> None:
    for path in store.rglob("*"):
        os.utime(path)
    assert (store / "leaf" / "memory.bin").stat().st_mtime_ns > OLD_NS
    assert run("mount", store, mountpoint).returncode == 0
    try:
        view = (mountpoint / "leaf" / "memory.bin").read_bytes()
        assert view[PAGE : 2 * PAGE] == signed(1, PAGE, PAGE)
    finally:
        end(mountpoint)
