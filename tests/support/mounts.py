"""diffmergefs, mounted by the real command, and always unmounted again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support import mounttable, skips
from tests.support.live import until
from tests.support.processes import children_of, is_dead

#: Where the kernel has the directory for fusectl, and the command that mounts it there.
CONNECTIONS = Path("/sys/fs/fuse/connections")
MOUNT_FUSECTL = ("mount", "-t", "fusectl", "fusectl", str(CONNECTIONS))

_READY_SECONDS = 60
_END_SECONDS = 60
_REMEMBERED_SECONDS = 0.6  # longer than `replies.CHANGING_SECONDS`, without importing pyfuse3
_READY = re.compile(r"\bready\b")
_COMPLAINT = re.compile(r" (WARNING|ERROR|CRITICAL) |Traceback")


@dataclass(frozen=True)
class Mount:
    """A mounted diffmergefs: where it is, and its keeper, the process that was started."""

    path: Path
    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def pid(self) -> int:
        """The server: the process that answers now."""
        return server_of(self.process.pid)

    def kill(self) -> None:
        """Kill the server and its keeper, so that nothing serves the mount any more."""
        self.process.send_signal(signal.SIGSTOP)  # so that it starts no other server
        server = self.pid
        os.kill(server, signal.SIGKILL)
        until(lambda: is_dead(server), "the server did not die")
        self.process.kill()
        self.process.wait(_END_SECONDS)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Neither the keeper nor the server runs meanwhile, so that the mount hangs.

        What the kernel remembered of it has expired, so whoever asks for anything waits.
        """
        pids = [self.process.pid, self.pid]
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(_REMEMBERED_SECONDS)
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def log(self) -> str:
        """All that the process has printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")


def server_of(keeper: int) -> int:
    """The process that a keeper has started last. Waits until there is one."""
    return until(lambda: children_of(keeper), "the keeper has no server")[-1]


@contextmanager
def mounted(
    source: Path | None, mountpoint: Path, *options: str, expect_log: tuple[str, ...] = ()
) -> Iterator[Mount]:
    """``diffmergefs mount -f [options] [source] mountpoint``, serving.

    With source None the options name the files (--base, --diff). The mount point
    must exist. Yields once the process has logged that it is ready and the mount
    answers. Afterwards the process is ended with SIGTERM, or by force, unless it
    has already ended, and nothing stays mounted. (A body that kills the process
    must wait for it too.)

    Then fails if the process did not end on SIGTERM in good order (in time, with
    exit status 0 and its mount gone), or if a line of its log is a warning, an
    error or a traceback and contains none of the `expect_log` strings. When the
    body fails, that failure is what is raised, with the log as a note.
    """
    skips.require_fuse()
    # Resolved now: once the mount is there, resolving would ask its server.
    real = os.path.realpath(mountpoint)
    mounts_before = len(mounttable.at(real))
    operands = [mountpoint] if source is None else [source, mountpoint]
    with tempfile.TemporaryDirectory(prefix="diffmergefs-log-") as directory:
        # The later one of two options counts: a test may name its own state directory.
        mine = ["mount", "-f", f"--state-dir={directory}", *options]
        command = [sys.executable, "-m", "diffmergefs", *mine, *map(str, operands)]
        log_path = Path(directory) / "log"
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONFAULTHANDLER": "1"},
            )
        mount = Mount(mountpoint, process, log_path)
        try:
            _wait_until_ready(mount, real, mounts_before)
            yield mount
        except BaseException as error:
            problem = _end(process, real, mounts_before)
            error.add_note(f"log of {' '.join(command)}:\n{mount.log()}{problem}")
            raise
        problem = _end(process, real, mounts_before)
        text = mount.log()
        assert not problem, f"{problem}\nlog of {' '.join(command)}:\n{text}"
        complaints = complaints_in(text, expect_log)
        listed = "\n".join(complaints)
        assert not complaints, f"unexpected in the log:\n{listed}\nthe whole log:\n{text}"


def complaints_in(log: str, expected: tuple[str, ...] = ()) -> list[str]:
    """The log's lines that complain and contain none of the expected strings."""
    return [
        line
        for line in log.splitlines()
        if _COMPLAINT.search(line) and not any(text in line for text in expected)
    ]


def require_fusectl() -> None:
    """Have fusectl mounted where the kernel's directory for it is, as systemd does."""
    if not os.path.ismount(CONNECTIONS):
        skips.require_mounts()
        subprocess.run(MOUNT_FUSECTL, check=True)


def abort(real: str) -> None:
    """Have the kernel cut the FUSE mount on this path off from its server.

    Whoever waits for an answer from it then gets an error. The path is absolute
    and without symbolic links; without a FUSE mount on it nothing happens.
    """
    found = mounttable.at(real)
    if not found or not found[-1].fstype.startswith("fuse"):
        return
    connection = CONNECTIONS / str(found[-1].minor)
    if not connection.exists():
        subprocess.run(MOUNT_FUSECTL, capture_output=True, check=False)
    with suppress(OSError):
        (connection / "abort").write_text("1", encoding="ascii")


def _wait_until_ready(mount: Mount, real: str, mounts_before: int) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not (_READY.search(mount.log()) and len(mounttable.at(real)) > mounts_before):
        status = mount.process.poll()
        assert status is None, f"diffmergefs ended with status {status} before it was ready"
        assert time.monotonic() < deadline, f"not ready within {_READY_SECONDS} s"
        time.sleep(0.02)
    # In a process of its own, which can be killed if the server does not answer.
    subprocess.run(["stat", "--", real], capture_output=True, check=False, timeout=_READY_SECONDS)


def _end(process: subprocess.Popen[bytes], real: str, mounts_before: int) -> str:
    """End the process and its mount; what was wrong with how it ended, or ""."""
    problem = ""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            problem = f"diffmergefs lived on for {_END_SECONDS} s after SIGTERM and was killed"
            # A file that is still open: then the mount is detached already.
            if len(mounttable.at(real)) > mounts_before:
                abort(real)
                mounttable.unmount(real)
            process.kill()
            process.wait()
        else:
            if status != 0:
                problem = f"diffmergefs ended with status {status} on SIGTERM"
            elif len(mounttable.at(real)) > mounts_before:
                problem = "diffmergefs ended on SIGTERM and left its mount behind"
    while len(mounttable.at(real)) > mounts_before:
        abort(real)
        mounttable.unmount(real)
    return problem
