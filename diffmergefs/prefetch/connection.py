"""A mount's connection to the kernel, and the guard that ends it when the daemon has died."""

from __future__ import annotations

import errno
import logging
import os
import subprocess

from diffmergefs.core import interpreter
from diffmergefs.prefetch import guard
from diffmergefs.system import tuning

log = logging.getLogger(__name__)


class Connection:
    """The connection of the FUSE mount with this device number (`major:minor`)."""

    def __init__(self, device: str) -> None:
        self._path = os.path.join(tuning.connection(device), "abort")
        self._abort = self._word = -1
        self._is_there = False
        self._guard: subprocess.Popen[bytes] | None = None

    def guard(self) -> None:
        """Have a process end the connection if the thread that calls this ends before `close`.

        Call it in the main thread, which ends first when a process is killed. It is done once.
        Raises OSError where fusectl is not mounted, or the mount is somebody else's.
        """
        if self._guard is not None:
            return
        if self._abort < 0:
            # Held open: the number may be another mount's when this one is gone.
            self._abort = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        self._word, word = os.pipe2(os.O_CLOEXEC)
        try:
            self._guard = interpreter.start(
                guard.__file__, str(os.getpid()), stdin=word, stdout=self._abort
            )
        finally:
            os.close(word)
            if self._guard is None:
                self._word = _closed(self._word)

    def wait_for_guard(self) -> None:
        """Return once the guard is on its guard: some ten milliseconds after it was started.

        Call it in a worker thread, after `guard`. Raises OSError if it has ended instead.
        """
        if self._word >= 0:
            is_there = os.read(self._word, 1)
            self._word = _closed(self._word)
            self._is_there = bool(is_there)
        if not self._is_there:
            raise ChildProcessError(errno.ECHILD, "the guard cannot be run", guard.__file__)

    def abort(self) -> None:
        """End it, if it is guarded: whatever waits for an answer gets an error. Never raises."""
        if self._guard is not None:
            try:
                os.write(self._abort, b"1")
            except OSError as error:
                log.warning("%s: cannot be written: %s", self._path, error.strerror)

    def close(self) -> None:
        """Let it go as it is, and end the guard."""
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            self._guard = None
        self._abort, self._word = _closed(self._abort), _closed(self._word)


def _closed(fd: int) -> int:
    if fd >= 0:
        os.close(fd)
    return -1
