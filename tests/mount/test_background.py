"""`mount` without -f: it returns when the mount answers, or says why it did not come up."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.cli import logs
from tests.support import mounttable
from tests.support.images import PAGE, signed, write_layer
from tests.support.live import Gate, patch_children, until
from tests.support.mounts import mounted
from tests.support.processes import keeper_with, processes_with
from tests.support.stores import OLD_NS, age, pages, write_chain, write_tag

SIZE_MISMATCH, UNTRUSTED, REFUSED, FAILED, TIMEOUT, NO_FILE = 4, 5, 10, 11, 12, 14
USAGE = 2


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


def run(*arguments: object, cwd: Path | str = "/") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffmergefs", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=90, cwd=cwd)


def is_mounted(path: Path) -> bool:
    return bool(mounttable.at(str(path)))


def end(path: Path) -> None:
    assert run("umount", path).returncode == 0
    until(lambda: not processes_with(path), "the daemon did not end")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.splitlines()[-1]


def test_it_returns_when_the_mount_answers(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = run("mount", "--log", log, store, mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (mountpoint / "leaf" / "memory.bin").read_bytes()[PAGE:][:PAGE] == signed(1, PAGE, PAGE)
    pid = keeper_with(mountpoint)
    proc = Path(f"/proc/{pid}")
    assert os.readlink(proc / "cwd") == "/"
    assert [os.readlink(proc / "fd" / str(n)) for n in range(3)] == [os.devnull] * 3
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    parent, session, terminal = int(fields[1]), int(fields[3]), int(fields[4])
    assert parent != os.getpid() and session == pid and terminal == 0
    os.truncate(store / "leaf" / "memory.bin", PAGE)
    until(lambda: "leaf: not shown: leaf/memory.bin: 4096 bytes" in log.read_text(), "no log")
    os.kill(pid, signal.SIGTERM)
    until(lambda: not processes_with(mountpoint), "the daemon did not end")
    assert not is_mounted(mountpoint)
    text = log.read_text()
    assert " INFO diffmergefs.fuse.session: ready\n" in text and "SIGTERM: detached" in text
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
    "ambiguous": (ambiguous, 3, "choose one with --layout"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_the_callers(
    failure: str, store: Path, public_path: Path, mountpoint: Path
) -> None:
    arguments, code, text = FAILURES[failure]
    done = run("mount", *arguments(public_path), mountpoint)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("diffmergefs: /") and text in done.stderr
    assert done.stderr.count("\n") == 1
    assert not is_mounted(mountpoint) and not processes_with(mountpoint)


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
        reason = f"{store} is mounted there already; choose an empty directory elsewhere"
        assert last_line(done) == f"diffmergefs: {mountpoint}: {reason}"
        assert sorted(os.listdir(mountpoint)) == ["base", "leaf"]
        assert len(mounttable.at(str(mountpoint))) == 1
    finally:
        end(mountpoint)


@pytest.mark.parametrize("option", ["rw", "max_read=4096", "fsname=x", "fd=3", "no_such_option"])
def test_options_that_are_refused(option: str, store: Path, mountpoint: Path) -> None:
    done = run("mount", "-o", f"noatime,{option}", store, mountpoint)
    assert done.returncode == USAGE
    assert last_line(done).startswith(f"diffmergefs: mount: -o {option}: ")
    assert not is_mounted(mountpoint) and not processes_with(mountpoint)


def test_options_of_mount_8_are_taken(store: Path, mountpoint: Path) -> None:
    context = 'context="system_u:object_r:x:s0:c1,c2"'
    given = f"{context},nofail,_netdev,x-systemd.automount,noatime,user,comment=x"
    done = run("mount", "-o", given, store, mountpoint)
    assert done.returncode == 0, done
    try:
        assert sorted(os.listdir(mountpoint)) == ["base", "leaf"]
        command = ["findmnt", "-nro", "OPTIONS", str(mountpoint)]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert "noatime" in found.stdout.split(",")
    finally:
        end(mountpoint)


@pytest.mark.parametrize("option", ["page_size=5000", "page_size=x", "layout=none"])
def test_our_own_options_are_checked(option: str, store: Path, mountpoint: Path) -> None:
    done = run("mount", "-o", option, store, mountpoint)
    assert done.returncode == USAGE
    name, _, value = option.partition("=")
    (line,) = done.stderr.splitlines()
    assert name.replace("_", "-") in line and value in line


def test_the_log_file_cannot_be_written(store: Path, mountpoint: Path) -> None:
    log = store / "missing" / "log"
    done = run("mount", "--log", log, store, mountpoint)
    assert done.returncode == NO_FILE
    assert (
        last_line(done)
        == f"diffmergefs: {log}: cannot log there: No such file or directory; check its name"
    )
    assert not is_mounted(mountpoint) and not processes_with(mountpoint)


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
    code = "import signal\n"
    if where == "look":
        code += "import diffmergefs.fuse.served as module\n"
        code += "module.Store.look = lambda s: wait_at_gate()\n"
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
    gate.patch(monkeypatch, code)
    try:
        done = run("mount", "--timeout", "2", "store", "mnt", cwd=public_path)
    finally:
        gate.open()
    assert done.returncode == TIMEOUT
    assert f"{mountpoint}: the mount did not answer within 2 s" in last_line(done)
    assert not is_mounted(mountpoint) and not processes_with(mountpoint)


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


def start_that_hangs(
    where: str, store: Path, public_path: Path, patch: pytest.MonkeyPatch, *options: str
) -> tuple[Gate, subprocess.Popen[str]]:
    """A mount whose daemon waits at a gate: before it mounts ('look'), or after ('mounted')."""
    gate = Gate(public_path / "gate")
    if where == "look":
        code = "import diffmergefs.fuse.served as module\n"
        code += "module.Store.look = lambda self: wait_at_gate()\n"
    else:
        code = "import pyfuse3\nreal = pyfuse3.init\n"
        code += "def init(*args):\n    real(*args)\n    wait_at_gate()\npyfuse3.init = init\n"
    gate.patch(patch, code)
    command = [sys.executable, "-m", "diffmergefs", "mount", "--timeout", "60", *options]
    process = subprocess.Popen(
        [*command, str(store), str(public_path / "mnt")],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=public_path,
    )
    gate.wait_until_reached()
    return gate, process


def end_by_force(gate: Gate, process: subprocess.Popen[str], mountpoint: Path) -> None:
    gate.open()
    for pid in processes_with(mountpoint):
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.communicate(timeout=60)


@pytest.mark.parametrize("front", [True, False], ids=["front", "background"])
@pytest.mark.parametrize("where", ["look", "mounted"])
def test_a_signal_to_the_daemon_while_it_starts_leaves_no_mount(
    where: str,
    front: bool,
    store: Path,
    public_path: Path,
    mountpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["-f"] if front else []
    gate, caller = start_that_hangs(where, store, public_path, monkeypatch, *options)
    try:
        others = [pid for pid in processes_with(mountpoint) if pid != caller.pid]
        assert len(others) == (0 if front else 1)
        os.kill(caller.pid if front else others[0], signal.SIGTERM)
        if where == "mounted":
            assert is_mounted(mountpoint)
            gate.open()
        # Asked to stop before it was mounted it did not come up; after that it ends as ever.
        status = caller.wait(30)
        assert status == (143 if where == "look" else 0)
        until(lambda: not processes_with(mountpoint), "the daemon did not end")
        assert not is_mounted(mountpoint)
    finally:
        end_by_force(gate, caller, mountpoint)


@pytest.mark.parametrize("where", ["look", "mounted"])
def test_a_signal_to_the_caller_ends_the_daemon_and_its_mount(
    where: str,
    store: Path,
    public_path: Path,
    mountpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, caller = start_that_hangs(where, store, public_path, monkeypatch)
    try:
        assert is_mounted(mountpoint) == (where == "mounted")
        caller.send_signal(signal.SIGTERM)
        # A daemon that does not answer the signal is killed, and its mount taken off.
        assert caller.wait(30) == 143
        assert not processes_with(mountpoint) and not is_mounted(mountpoint)
    finally:
        end_by_force(gate, caller, mountpoint)


def test_a_daemon_whose_caller_is_gone_ends(
    store: Path,
    public_path: Path,
    mountpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = tmp_path / "log"
    gate, caller = start_that_hangs("mounted", store, public_path, monkeypatch, "--log", str(log))
    try:
        caller.kill()
        caller.wait(60)
        assert is_mounted(mountpoint) and processes_with(mountpoint)
        gate.open()
        until(lambda: not processes_with(mountpoint), "the daemon did not end")
        assert not is_mounted(mountpoint)
        assert "SIGTERM: detached" in log.read_text() and "Traceback" not in log.read_text()
    finally:
        end_by_force(gate, caller, mountpoint)


def test_a_start_that_failed_leaves_the_mount_that_stood_there(
    store: Path, public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("mount", store, mountpoint).returncode == 0
    gate = Gate(public_path / "gate")
    code = "import diffmergefs.system.mountpoint as module\n"
    gate.patch(monkeypatch, code + "module.check_mountpoint = lambda *args: wait_at_gate()\n")
    try:
        assert run("mount", "--timeout", "1", store, mountpoint).returncode == TIMEOUT
        assert sorted(os.listdir(mountpoint)) == ["base", "leaf"]
    finally:
        gate.open()
        end(mountpoint)


# As an attacker who may name a directory of SOURCE would have it.
FORGED = "evil\n2000-01-01 00:00:00,000 ERROR diffmergefs.x: forged\x1b[2J\x85\u2028"
RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ diffmergefs[.\w]*: ")
RAISES = (
    "import diffmergefs.fuse.served as module\n"
    "def total_bytes(self):\n"
    f"    raise RuntimeError({FORGED!r})\n"
    "module.Store.total_bytes = total_bytes\n"
)


@pytest.mark.parametrize("front", [True, False], ids=["front", "background"])
def test_a_log_record_is_one_line_and_a_traceback_is_set_in(
    front: bool, store: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tag(store, FORGED, layer=5, numbers=[5])
    patch_children(monkeypatch, tmp_path / "patch", RAISES)
    if front:
        expected = ("not shown: ", "statfs failed", "    Traceback", "forged")
        with mounted(store, mountpoint, expect_log=expected) as mount:
            with pytest.raises(OSError, match="Input/output error"):
                os.statvfs(mountpoint)
            text = mount.log()
    else:
        done = run("mount", "--log", tmp_path / "log", store, mountpoint)
        try:
            assert done.returncode == 0
            (line,) = done.stderr.splitlines()
            assert "evil\\n2000" in line and "forged\\x1b[2J\\x85\\u2028: not shown: " in line
            with pytest.raises(OSError, match="Input/output error"):
                os.statvfs(mountpoint)
        finally:
            end(mountpoint)
        text = (tmp_path / "log").read_text()
    lines = text.removesuffix("\n").split("\n")
    assert all(RECORD.match(line) or line.startswith("    ") for line in lines)
    assert not {"\x1b", "\x85", "\u2028"} & set(text)
    assert "    Traceback (most recent call last):" in lines
    shown = "evil\\n2000-01-01 00:00:00,000 ERROR diffmergefs.x: forged\\x1b[2J\\x85\\u2028"
    assert [line for line in lines if line.startswith("    RuntimeError: evil")]
    assert [line for line in lines if RECORD.match(line) and f"{shown}: not shown: " in line]


def test_a_syslog_that_takes_nothing_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr(logs, "SYSLOG", str(tmp_path / "log"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "log"))
        handler = logs.syslog_handler("auto")
        assert handler is not None
        record = logging.LogRecord("x", logging.WARNING, "", 0, "%s", ("a\nb\x1b",), None)
        full = max(2000, 2 * int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()))
        writer = threading.Thread(
            target=lambda: [handler.handle(record) for _ in range(full)], daemon=True
        )
        writer.start()
        writer.join(60)
        assert not writer.is_alive()
        assert syslog.recv(1000).rstrip(b"\0") == b"<28>diffmergefs: a\\nb\\x1b"
        # And what comes later arrives again.
        syslog.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                syslog.recv(1000)
        handler.handle(record)
        assert syslog.recv(1000).startswith(b"<28>")
        handler.close()


def test_a_failure_at_the_start_is_one_line_whatever_names_are_in_it(
    public_path: Path, mountpoint: Path
) -> None:
    done = run("mount", "--log", public_path / "log", public_path / "none\n2\x85\u2028", mountpoint)
    assert done.returncode == NO_FILE
    name = f"{public_path}/none\\n2\\x85\\u2028"
    line = f"diffmergefs: {name}: No such file or directory; check its name"
    assert done.stderr.removesuffix("\n").split("\n") == [line]


def start_with(
    fd: int, *arguments: object, before: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """A mount by a caller that has left the descriptor open, as number 3."""
    command = [sys.executable, "-m", "diffmergefs", "mount", *map(str, arguments)]
    return subprocess.run(
        ["/bin/bash", "-c", f'{before} exec "$@" 3<&{fd}', "bash", *command],
        pass_fds=(fd,),
        capture_output=True,
        text=True,
        timeout=90,
        cwd="/",
        **options,
    )


def files_of(mountpoint: Path) -> list[str]:
    pid = keeper_with(mountpoint)
    return [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]


def test_what_its_caller_left_open_is_closed(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    """flock(1) holds its lock by such a descriptor."""
    lock = tmp_path / "lock"
    with lock.open("w") as file:
        done = start_with(file.fileno(), "--log", tmp_path / "log", store, mountpoint)
        assert done.returncode == 0, done
    try:
        assert str(lock) not in files_of(mountpoint)
        assert str(tmp_path / "log") in files_of(mountpoint)
        assert (mountpoint / "leaf" / "memory.bin").read_bytes()
    finally:
        end(mountpoint)
    assert "ready" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("path", ["/dev/fd/3", "/proc/self/fd/3"])
def test_a_descriptor_that_an_argument_names_stays(
    path: str, store: Path, mountpoint: Path
) -> None:
    layer = store / "leaf" / "memory.bin"
    with layer.open("rb") as file:
        base = store / "base" / "memory.bin"
        done = start_with(file.fileno(), "--base", base, "-o", f"diff={path}", mountpoint)
        assert done.returncode == 0, done
    try:
        view = (mountpoint / "memory.bin").read_bytes()
        assert view[PAGE : 2 * PAGE] == signed(1, PAGE, PAGE)
    finally:
        end(mountpoint)


@pytest.mark.parametrize("is_meant", [True, False])
def test_a_service_managers_descriptors_stay(
    is_meant: bool, store: Path, mountpoint: Path, tmp_path: Path
) -> None:
    handed = tmp_path / "handed"
    number = "$$" if is_meant else "1"
    before = f"export LISTEN_PID={number} LISTEN_FDS=1 LISTEN_FDNAMES=x;"
    with handed.open("w") as file:
        done = start_with(file.fileno(), store, mountpoint, before=before)
        assert done.returncode == 0, done
    try:
        assert (str(handed) in files_of(mountpoint)) == is_meant
    finally:
        end(mountpoint)
