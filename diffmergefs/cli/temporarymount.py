"""A mount for the moment: served by a process of its own, and gone afterwards whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from diffmergefs.core import interpreter
from diffmergefs.core.errors import MountFailedError, MountTimeoutError
from diffmergefs.system import mountpoint as mountpoints
from diffmergefs.system.sdnotify import ADDRESS

_READY_SECONDS = 60.0
_END_SECONDS = 5.0
_SERVE = "from diffmergefs.cli import main; sys.exit(main())"


@contextmanager
def temporary_mount(mountpoint: Path, *arguments: str, before: str = "") -> Iterator[int]:
    """`mount -f *arguments mountpoint`; the pid of what serves it, from when the mount answers.

    `before` is Python code that the process runs first. Afterwards the mount is gone, whoever uses
    it, and so is the process. Raises MountFailedError with the reason that it gave, and
    MountTimeoutError.
    """
    with tempfile.TemporaryFile() as said, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind("")  # the kernel finds a free abstract name
        child = interpreter.start_code(
            before + _SERVE,
            *("mount", "-f", *arguments, "--", str(mountpoint)),
            stdout=said,
            stderr=said,
            env=os.environ | {ADDRESS: "@" + told.getsockname()[1:].decode()},
        )
        try:
            _wait_until_ready(child, told, said, mountpoint)
            yield child.pid
        finally:
            _end(child)
            _take_off(mountpoint)


def _wait_until_ready(
    child: subprocess.Popen[bytes], told: socket.socket, said: IO[bytes], mountpoint: Path
) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    told.settimeout(0.05)
    while True:
        with contextlib.suppress(TimeoutError):
            if told.recv(4096) == b"READY=1":
                return
        if child.poll() is not None:
            raise MountFailedError(_last_line(said) or f"ended with status {child.returncode}")
        if time.monotonic() > deadline:
            raise MountTimeoutError(f"{mountpoint}: no answer within {_READY_SECONDS:g} s")


def _last_line(said: IO[bytes]) -> str:
    said.seek(0)
    lines = os.fsdecode(said.read()).strip().split("\n")
    return lines[-1].removeprefix("diffmergefs: ")


def _end(child: subprocess.Popen[bytes]) -> None:
    # The first signal lets it serve open files on, the second does not.
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        child.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_END_SECONDS)
            return


def _take_off(mountpoint: Path) -> None:
    known = mountpoints.mount_entry(str(mountpoint))
    if known is not None and known.kind == mountpoints.FILESYSTEM_TYPE:
        mountpoints.detach(known.path)
