"""A mount's connection to the kernel: ended on demand, or by a guard when the daemon has died."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

from diffmergefs import guard, tuning

log = logging.getLogger(__name__)


class Connection:
    """The connection of the FUSE mount with this device number (`major:minor`).

    Held by a descriptor: the number may be another mount's when this one is gone.
    """

    def __init__(self, device: str) -> None:
        """Raises OSError where fusectl is not mounted, or the mount is somebody else's."""
        path = os.path.join(tuning.connection(device), "abort")
        self._abort = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._guard: subprocess.Popen[bytes] | None = None

    def start_guard(self) -> None:
        """Have a process end the connection when this thread, the main one, ends by a kill.

        Call it in the main thread. Raises OSError.
        """
        # Isolated: neither the environment nor a directory of somebody's says what is run.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=self._abort,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            start_new_session=True,
        )

    def abort(self) -> None:
        """End it: whatever waits for an answer gets an error. Never raises."""
        try:
            os.write(self._abort, b"1")
        except OSError as error:
            log.warning("the connection to the kernel cannot be ended: %s", error.strerror)

    def close(self) -> None:
        """Let it go as it is, and end the guard."""
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
        os.close(self._abort)
