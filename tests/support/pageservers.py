"""Page servers, run by the real command, and always ended again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.mounts import complaints_in

_SECONDS = 60


@dataclass(frozen=True)
class PageServer:
    """A running `diffmergefs uffd`: its socket or directory of sockets, and its process."""

    socket: Path
    process: subprocess.Popen[bytes]
    log_path: Path

    def log(self) -> str:
        """All that the process has printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until its log has this text so often."""
        deadline = time.monotonic() + _SECONDS
        while self.log().count(text) < count:
            assert self.process.poll() is None and time.monotonic() < deadline, (text, self.log())
            time.sleep(0.02)


@contextmanager
def serving(
    socket: Path,
    *options: str | Path,
    at: str = "--socket",
    expect_log: tuple[str, ...] = (),
) -> Iterator[PageServer]:
    """`diffmergefs uffd --socket SOCKET` with these options, from when it is ready on.

    With `at` "--socket-dir", SOCKET is a directory.

    Afterwards it is ended by SIGTERM, unless it has ended already. Then fails if it did not end in
    good order, or if its log complains of anything but `expect_log`.
    """
    with tempfile.TemporaryDirectory(prefix="diffmergefs-log-") as directory:
        mine = ["uffd", f"--state-dir={directory}", *options, at, socket]
        log_path = Path(directory) / "log"
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "diffmergefs", *map(str, mine)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONFAULTHANDLER": "1"},
            )
        server = PageServer(socket, process, log_path)
        try:
            server.wait_for(": ready, serving")
            yield server
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            status = process.wait(_SECONDS)
        except BaseException as error:
            process.kill()
            process.wait()
            error.add_note(f"its log:\n{server.log()}")
            raise
        assert status == 0, server.log()
        assert not complaints_in(server.log(), expect_log), server.log()
