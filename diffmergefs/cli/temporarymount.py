"""A temporary mount: served by its own process, and always removed at the end."""

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

from diffmergefs.core.errors import MountFailedError, MountTimeoutError
from diffmergefs.system import children
from diffmergefs.system import mountpoint as mountpoints
from diffmergefs.system.daemon import ADDRESS
from diffmergefs.system.mounttable import FILESYSTEM_TYPE, mount_entry

_READY_SECONDS = 60.0
_END_SECONDS = 5.0
_SERVE = "from diffmergefs.cli import main; sys.exit(main())"


@contextmanager
def temporary_mount(mountpoint: Path, *arguments: str, before: str = "") -> Iterator[int]:
    """Run `mount -f *arguments mountpoint`, and yield its pid when the mount answers.

    `before` is Python code that the process runs first. At the end the mount and the process are
    removed, even if the mount is in use. Raises MountFailedError with the process's message, and
    MountTimeoutError.
    """
    with (
        tempfile.TemporaryFile() as output,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
    ):
        ready.bind("")  # the kernel finds a free abstract name
        child = children.start_code(
            before + _SERVE,
            *("mount", "-f", *arguments, "--", str(mountpoint)),
            stdout=output,
            stderr=output,
            env=os.environ | {ADDRESS: "@" + ready.getsockname()[1:].decode()},
        )
        try:
            _wait_until_ready(child, ready, output, mountpoint)
            yield child.pid
        finally:
            _end(child)
            _detach(mountpoint)


def _wait_until_ready(
    child: subprocess.Popen[bytes], ready: socket.socket, output: IO[bytes], mountpoint: Path
) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    ready.settimeout(0.05)
    while True:
        with contextlib.suppress(TimeoutError):
            if ready.recv(4096) == b"READY=1":
                return
        if child.poll() is not None:
            raise MountFailedError(_last_line(output) or f"ended with status {child.returncode}")
        if time.monotonic() > deadline:
            raise MountTimeoutError(f"{mountpoint}: no answer within {_READY_SECONDS:g} s")


def _last_line(output: IO[bytes]) -> str:
    output.seek(0)
    lines = os.fsdecode(output.read()).strip().split("\n")
    return lines[-1].removeprefix("diffmergefs: ")


def _end(child: subprocess.Popen[bytes]) -> None:
    # After the first signal it still serves open files, after the second it does not.
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        child.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_END_SECONDS)
            return


def _detach(mountpoint: Path) -> None:
    known = mount_entry(str(mountpoint))
    if known is not None and known.kind == FILESYSTEM_TYPE:
        mountpoints.detach(known.path)
