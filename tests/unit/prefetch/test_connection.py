"""The connection of a mount is ended on demand, and when its daemon was killed; never otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffmergefs.prefetch import connection as module
from diffmergefs.prefetch.connection import Connection
from diffmergefs.system import tuning
from tests.support.live import until

DEVICE = "0:45"

# A daemon that has a thread which goes on when the main thread has ended, as one does that hangs
# in the kernel; here it is the whole process that goes on, but for its main thread.
DAEMON = """
import ctypes, sys, threading, time
from diffmergefs.system import tuning
from diffmergefs.prefetch.connection import Connection
tuning.CONNECTIONS = sys.argv[1]
connection = Connection("0:45")
connection.guard()
connection.wait_for_guard()
print(connection._guard.pid, flush=True)
word = sys.stdin.readline()
if word == "close\\n":
    connection.close()
    print("closed", flush=True)
    sys.stdin.readline()
elif word == "thread\\n":
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    ctypes.CDLL(None).syscall(60, 0)  # exit of this thread alone
"""


@pytest.fixture
def abort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning, "CONNECTIONS", str(tmp_path))
    path = tmp_path / "45" / "abort"
    path.parent.mkdir()
    path.touch()
    return path


def started(abort: Path) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", DAEMON, str(abort.parent.parent)]
    daemon = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    )
    assert daemon.stdout is not None
    guard = int(daemon.stdout.readline())
    return daemon, guard


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def is_gone(pid: int) -> bool:
    try:
        return status_of(pid)["State"].startswith("Z")
    except FileNotFoundError:
        return True


def test_a_killed_daemon_ends_its_connection(abort: Path) -> None:
    daemon, guard = started(abort)
    daemon.kill()
    daemon.communicate(timeout=20)
    until(lambda: abort.read_bytes() == b"1", "it was not aborted")
    until(lambda: is_gone(guard), "the guard is left")


def test_a_main_thread_that_is_gone_is_enough(abort: Path) -> None:
    """The other threads may hang in the kernel, and then neither a pipe nor a pidfd would tell."""
    daemon, guard = started(abort)
    assert daemon.stdin is not None
    daemon.stdin.write("thread\n")
    daemon.stdin.flush()
    try:
        until(lambda: abort.read_bytes() == b"1", "it was not aborted")
        assert daemon.poll() is None
    finally:
        daemon.kill()
        daemon.communicate(timeout=20)
    until(lambda: is_gone(guard), "the guard is left")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_of_them_leaves_the_guard_to_the_daemons_end(
    number: signal.Signals, abort: Path
) -> None:
    daemon, guard = started(abort)
    os.kill(guard, number)
    assert not is_gone(guard) and abort.read_bytes() == b""
    daemon.kill()
    daemon.communicate(timeout=20)
    until(lambda: abort.read_bytes() == b"1", "it was not aborted")


def test_a_connection_that_is_closed_is_let_go_and_has_no_guard(abort: Path) -> None:
    daemon, guard = started(abort)
    assert daemon.stdin is not None and daemon.stdout is not None
    daemon.stdin.write("close\n")
    daemon.stdin.flush()
    assert daemon.stdout.readline() == "closed\n"
    assert is_gone(guard) and not Path(f"/proc/{guard}").exists()
    daemon.communicate("\n", timeout=20)
    assert abort.read_bytes() == b""


def test_a_guard_whose_daemon_is_gone_before_it_looks_aborts_at_once(abort: Path) -> None:
    with abort.open("wb") as file:
        command = [sys.executable, "-I", "-S", module.__file__, "1"]
        read, write = os.pipe()
        subprocess.run(command, stdin=file, stdout=write, check=True, timeout=20)
        os.close(write)
        assert os.read(read, 2) == b"1"
        os.close(read)
    assert abort.read_bytes() == b"1"


def test_on_demand(abort: Path) -> None:
    connection = Connection(DEVICE)
    connection.abort()
    assert abort.read_bytes() == b"", "it was not guarded"
    connection.guard()
    connection.guard()
    connection.wait_for_guard()
    connection.wait_for_guard()
    connection.abort()
    connection.close()
    connection.close()
    assert abort.read_bytes() == b"1"


def test_without_fusectl_there_is_none(abort: Path) -> None:
    connection = Connection("0:46")
    with pytest.raises(FileNotFoundError):
        connection.guard()
    connection.abort()
    connection.close()


def test_an_interpreter_that_cannot_be_run_is_no_guard(
    abort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    connection = Connection(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/gone/python")
        with pytest.raises(FileNotFoundError):
            connection.guard()
    connection.abort()
    connection.close()
    assert abort.read_bytes() == b"" and set(os.listdir("/proc/self/fd")) == before


def test_a_guard_that_ends_before_it_is_on_its_guard_is_none(
    abort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends.py").write_text("")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "ends.py"))
    before = set(os.listdir("/proc/self/fd"))
    connection = Connection(DEVICE)
    connection.guard()
    for _ in range(2):
        with pytest.raises(ChildProcessError):
            connection.wait_for_guard()
    connection.close()
    assert set(os.listdir("/proc/self/fd")) == before
