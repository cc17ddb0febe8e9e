"""An alarm that wakes the event loop out of a read of the FUSE device that finds nothing to read.

pyfuse3 reads a blocking descriptor once it is readable, with the interpreter's lock held. If the
only request is taken back in between, because who asked got SIGKILL, read(2) sleeps until the next
one comes. No thread runs meanwhile, and no timer, and a guest whose CPUs all wait for pages asks
for nothing more. A signal ends the read with EINTR, on which pyfuse3 waits anew.
"""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager

#: Between two alarms: a read that finds nothing takes hardly more than twice as long.
SECONDS = 0.05
#: Where it cannot be told when a read is tried, and so whether it is needed.
ALWAYS_SECONDS = 0.2


class ReadAlarm(AbstractContextManager["ReadAlarm"]):
    """Rings (SIGALRM) from `expect` on, again and again, until it is found that none is expected.

    Enter it in the main thread, which is the one that it wakes; afterwards the signal's handler and
    its timer are as before. Outside of `with` it does nothing. A mount that has no requests has no
    alarms: nothing is set while nothing is read, and to look twice costs less than to set a timer
    twice for each request. No child inherits the timer, and Python takes up again any call of its
    own that the signal interrupts.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.is_expected = False
        self._seconds = seconds
        self._is_set = True  # as long as there is no handler

    def __enter__(self) -> ReadAlarm:
        self._timer_before = signal.setitimer(signal.ITIMER_REAL, 0)
        self._handler_before = signal.signal(signal.SIGALRM, self._ring)
        self._is_set = False
        return self

    def __exit__(self, *error: object) -> None:
        self._is_set = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler_before)
        signal.setitimer(signal.ITIMER_REAL, *self._timer_before)

    def expect(self) -> None:
        """A read is tried now, which may find nothing; set `is_expected` to False after it."""
        self.is_expected = True
        if not self._is_set:
            self._is_set = True
            signal.setitimer(signal.ITIMER_REAL, self._seconds, self._seconds)

    def _ring(self, number: int, frame: object) -> None:
        # That it came is all that it is for. In the same thread as `expect`, between two of its
        # steps: it is set again if a read is tried after this.
        if not self.is_expected:
            self._is_set = False
            signal.setitimer(signal.ITIMER_REAL, 0)
