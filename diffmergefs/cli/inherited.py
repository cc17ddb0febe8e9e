"""What a process has from whoever started it, put right before anything else happens."""

from __future__ import annotations

import os
import signal
import sys
from typing import TextIO


def put_right() -> None:
    """Have the standard streams open, no signal blocked, and SIGCHLD not ignored.

    A closed standard stream is as good as /dev/null; left closed, the first file that is opened
    would take its place, and get what is said there. SIGTERM would never come if it is blocked, and
    where SIGCHLD is ignored nobody learns how a child ended. (Ignored signals that end a process
    stay ignored, as nohup(1) has it.)
    """
    for fd in range(3):
        if not _is_open(fd):
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    sys.stdout = sys.stdout or _stream(1)
    sys.stderr = sys.stderr or _stream(2)
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _stream(fd: int) -> TextIO:
    return open(fd, "w", encoding="utf-8", closefd=False)
