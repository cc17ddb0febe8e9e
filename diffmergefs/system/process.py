"""One process of ours: whether it lives, how it ended, and whether the kernel may end it."""

from __future__ import annotations

import contextlib
import os
import signal
import time

_TRIES, _TRY_SECONDS = 20, 0.0002
_OOM_SCORE = 100


def is_dead(process: int) -> bool:
    """Whether it has ended; its threads may hang in the kernel all the same."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def end_of(process: int, tries: int = _TRIES) -> int | None:
    """The exit status of a child that has ended, or the number of the signal, negative.

    No zombie of it is left then. None if threads of it still hang in the kernel: otherwise they end
    within a moment, so it tries so many times.
    """
    done = 0
    try:
        while not done and tries:
            done, status = os.waitpid(process, os.WNOHANG)
            tries -= 1
            time.sleep(0 if done else _TRY_SECONDS)
    except ChildProcessError:
        return -signal.SIGKILL  # somebody else has waited for it
    return os.waitstatus_to_exitcode(status) if done else None


def text_of_end(status: int | None) -> str:
    """What `end_of` found, in words."""
    if status is None:
        return "it was killed, and a thread of it still waits for storage or for a page"
    if status < 0:
        return f"it was killed by {_signal_name(-status)}"
    return f"it ended with status {status}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def oom_kills() -> str:
    """A text that changes when the kernel kills a process because memory is short.

    "" if the kernel does not count that.
    """
    with contextlib.suppress(OSError), open("/proc/vmstat", encoding="ascii") as file:
        return next((line for line in file if line.startswith("oom_kill ")), "")
    return ""


def prefer_for_oom() -> None:
    """Have the kernel kill this process before others like it, if it may be told so."""
    # One may always raise one's own score.
    path = "/proc/self/oom_score_adj"
    with contextlib.suppress(OSError, ValueError), open(path, "r+", encoding="ascii") as file:
        score = min(1000, int(file.read()) + _OOM_SCORE)
        file.seek(0)
        file.write(str(score))
