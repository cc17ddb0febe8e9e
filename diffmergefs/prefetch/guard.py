"""The guard of a mount: if the daemon dies, the kernel is told to end the mount's connection.

Run as a program, by its path: PID, the daemon's, which starts it from its main thread; its stdout
is fusectl's `abort` of the mount, and its stdin a pipe to the daemon, into which it writes once it
is on its guard. A daemon that is killed while it pushes pages may leave a thread in the kernel,
waiting for a page of a request that nobody will answer: that thread keeps the connection open, and
so every reader would wait for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_DEATH = signal.SIGUSR1
# Whoever ends the daemon so ends the guard by the daemon's end.
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def guard(daemon: int) -> None:
    """Write to stdin, wait for the death of the parent `daemon`, and then write to stdout."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {_DEATH})
    # Comes when the thread that started this one ends, though others of its process hang.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(_DEATH))
    with contextlib.suppress(BrokenPipeError):
        os.write(0, b"1")
    if os.getppid() == daemon:
        signal.sigwait({_DEATH})
    os.write(1, b"1")


if __name__ == "__main__":
    guard(int(sys.argv[1]))
