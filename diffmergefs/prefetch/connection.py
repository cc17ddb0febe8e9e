"""A mount's connection to the kernel, and the guard that ends it if the daemon dies."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

if __name__ != "__main__":  # the guard runs this file with the standard library alone, in 10 ms
    import errno
    import logging
    import subprocess

    from diffmergefs.system import children, tuning

    log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_DEATH = signal.SIGUSR1
# A signal that ends the daemon ends the guard by the daemon's end.
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Connection:
    """The connection of the FUSE mount with this device number (`major:minor`)."""

    def __init__(self, device: str) -> None:
        self._path = os.path.join(tuning.connection(device), "abort")
        self._abort = -1
        self._armed = b""  # what the guard has reported
        self._guard: subprocess.Popen[bytes] | None = None

    def guard(self) -> None:
        """Start a process that ends the connection if the calling thread ends before `close`.

        Call it in the main thread, which ends first if a process is killed. Later calls do nothing.
        Raises OSError if fusectl is not mounted, or the mount belongs to another user.
        """
        if self._guard is not None:
            return
        if self._abort < 0:
            # Keep it open: the number may belong to another mount when this one is gone.
            self._abort = os.open(self._path, os.O_WRONLY)
        self._guard = children.start(
            __file__, str(os.getpid()), stdin=self._abort, stdout=subprocess.PIPE
        )

    def wait_for_guard(self) -> None:
        """Wait until the guard is armed, about ten milliseconds after its start.

        Call it in a worker thread, after `guard`. Raises OSError if the guard has ended instead.
        """
        guard = self._guard
        if not self._armed and guard is not None and guard.stdout is not None:
            with contextlib.suppress(ValueError):  # `close` was faster
                self._armed = guard.stdout.read(1)
        if not self._armed:
            raise ChildProcessError(errno.ECHILD, "the guard cannot run", __file__)

    def abort(self) -> None:
        """End the connection if it has a guard: all that wait get an error. Never raises."""
        if self._guard is not None:
            try:
                os.write(self._abort, b"1")
            except OSError as error:
                log.warning("%s: cannot be written: %s", self._path, error.strerror)

    def close(self) -> None:
        """Leave the connection as it is, and end the guard."""
        if self._guard is not None:
            with self._guard as guard:
                guard.kill()
            self._guard = None
        if self._abort >= 0:
            os.close(self._abort)
            self._abort = -1


def watch(daemon: int) -> None:
    """The guard: report to stdout, wait for the death of the parent `daemon`, write to stdin.

    The daemon starts it from its main thread. stdin is fusectl's `abort` file of the mount, open
    for writing, and stdout a pipe to the daemon. A daemon that is killed in the middle of a push
    may leave a thread in the kernel that waits for a page of a request. Nobody will answer that
    request, and the thread keeps the connection open, so all readers would wait forever.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {_DEATH})
    # It comes when the thread that started this process ends, even if other threads hang.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(_DEATH))
    with contextlib.suppress(BrokenPipeError):
        os.write(1, b"1")
    if os.getppid() == daemon:
        signal.sigwait({_DEATH})
    os.write(0, b"1")


if __name__ == "__main__":
    watch(int(sys.argv[1]))
