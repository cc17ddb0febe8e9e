"""Giving back the page cache of layers once their bytes are in the page cache of a view."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref

from diffmergefs.core import background
from diffmergefs.core.view import MergedView

_BATCH = 8 << 20
_SECONDS = 1.0
_LARGEST_FOLIO = 2 << 20

Ranges = list[tuple[int, int]]


class DropBehind:
    """Has the kernel forget the layers' pages of what was served, some time after it was.

    Ranges that were served are gathered, 8 MiB or a second of them, and joined, also with the end
    of what was dropped before: the kernel forgets a large folio only as a whole. Each layer that
    supplied any of a range loses its pages of all of it, so also those that were read ahead and
    that newer layers hide. Pages around it stay: what was read ahead for the reads to come, parts
    of pages, and what is dirty or mapped by anybody. It is advice (posix_fadvise(2),
    POSIX_FADV_DONTNEED): nothing is lost but time when the same bytes are read again. The call may
    wait, so a thread of its own makes it.
    """

    def __init__(self) -> None:
        self._served: dict[MergedView, Ranges] = {}
        self._dropped: weakref.WeakKeyDictionary[MergedView, tuple[int, int]]
        self._dropped = weakref.WeakKeyDictionary()  # the last range of each
        self._bytes = 0
        self._guard = threading.Condition()
        self._ending = False
        self._thread: threading.Thread | None = None

    def served(self, view: MergedView, offset: int, length: int) -> None:
        """Note that these bytes of a view were answered. Never blocks for longer than a lock."""
        with self._guard:
            if self._thread is None:
                # At the first read, and not in a process that forks to the background first.
                self._thread = background.started(self._run, "drop-behind")
            if self._thread is None:
                return  # the pages stay, which costs memory that the kernel can take back
            was_idle = not self._served
            self._served.setdefault(view, []).append((offset, offset + length))
            self._bytes += length
            if was_idle or self._bytes >= _BATCH:
                self._guard.notify()

    def close(self) -> None:
        """Drop what is left, and end the thread; that is waited for a second at most."""
        with self._guard:
            self._ending = True
            self._guard.notify()
        if self._thread is not None:
            self._thread.join(_SECONDS)

    def _run(self) -> None:
        while not self._ending or self._served:
            with self._guard:
                self._guard.wait_for(lambda: self._ending or self._served)
                self._guard.wait_for(lambda: self._ending or self._bytes >= _BATCH, _SECONDS)
            self._drop_all()

    def _drop_all(self) -> None:
        # In a function of its own: its variables must not keep layers open while nothing happens.
        with self._guard:
            served, self._served, self._bytes = self._served, {}, 0
        for view, ranges in served.items():
            first, end = self._dropped.get(view, (0, 0))
            for start, stop in _joined(ranges):
                if start == end:
                    start = max(first, start - _LARGEST_FOLIO)
                drop(view, start, stop)
                self._dropped[view] = start, stop


def drop(view: MergedView, start: int, stop: int) -> None:
    """Have the kernel forget the whole pages of `[start, stop)` in the layers that supply any."""
    suppliers = {s.layer for s in view.segments(start, stop - start) if s.layer is not None}
    for number in suppliers:
        # A layer that was closed, or a filesystem that takes no advice: then it keeps its pages.
        with contextlib.suppress(OSError):
            fd = view.layers[number].fd
            os.posix_fadvise(fd, start, stop - start, os.POSIX_FADV_DONTNEED)


def _joined(ranges: Ranges) -> Ranges:
    joined: Ranges = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined
