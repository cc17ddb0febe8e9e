"""Dropping the pages of layers from the page cache once a view has served their bytes."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref

from diffmergefs.core import workers
from diffmergefs.core.view import MergedView

_BATCH = 8 << 20
_SECONDS = 1.0
_LARGEST_FOLIO = 2 << 20

Ranges = list[tuple[int, int]]


class DropBehind:
    """Drops the layers' pages of what was served from the page cache, some time later.

    It gathers the served ranges, for 8 MiB or a second, and joins them, also with the end of the
    range dropped before: the kernel drops a large folio only as a whole. Each layer that supplied
    any part of a range loses its pages of the whole range, including pages that were read ahead and
    that newer layers hide. These pages stay: what was read ahead beyond the range, partial pages,
    and pages that are dirty or mapped. The call is advice (posix_fadvise(2), POSIX_FADV_DONTNEED):
    it costs only time if the same bytes are read again. It may block, so a separate thread makes
    it.
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
        """Report that these bytes of a view were served. Blocks only for a lock."""
        with self._guard:
            if self._thread is None:
                # At the first read: before, the process may still fork to the background.
                self._thread = workers.started(self._run, "drop-behind")
            if self._thread is None:
                return  # the pages stay; the kernel can still reclaim them
            was_idle = not self._served
            self._served.setdefault(view, []).append((offset, offset + length))
            self._bytes += length
            if was_idle or self._bytes >= _BATCH:
                self._guard.notify()

    def close(self) -> None:
        """Drop the remaining ranges, and end the thread. Waits for a second at most."""
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
        # A separate function, because its variables must not keep layers open in an idle thread.
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
    """Drop the whole pages of `[start, stop)` in the layers that supply any part of it."""
    suppliers = {s.layer for s in view.segments(start, stop - start) if s.layer is not None}
    for number in suppliers:
        # A closed layer, or a filesystem that takes no advice, keeps its pages.
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
