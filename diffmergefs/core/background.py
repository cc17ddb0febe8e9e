"""Threads beside the work that matters, and the closing of files whose filesystem may hang."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue


def started(work: Callable[[], object], name: str) -> threading.Thread | None:
    """A new thread that does this, or None where no more can be started (pids.max, no memory).

    The end of the process does not wait for it. For work without which everything else goes on.
    """
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def close(fd: int, device: int) -> None:
    """Close a descriptor of a file of the filesystem `device` (st_dev): here, or inside of
    `closing_in_threads` at some time in a thread. Raises nothing: it is closed whatever is said.

    close(2) waits for the server of a network or FUSE filesystem, which may hang. May be called
    wherever a last reference drops, in the middle of anything.
    """
    if (queue := _Closing.queue) is not None:
        queue.put((fd, device))
    else:
        _close(fd)


@contextmanager
def closing_in_threads() -> Iterator[None]:
    """Inside, `close` never waits: each filesystem has a thread that closes its files.

    What is not closed at the end the end of the process closes. For one part of a process at once.
    """
    closing = _Closing()
    if started(closing.deal, "closing") is None:
        yield
        return
    # SimpleQueue alone may be put to where a finalizer has interrupted another put.
    _Closing.queue = closing.given
    try:
        yield
    finally:
        _Closing.queue = None
        closing.given.put(None)


class _Closing:
    queue: SimpleQueue[tuple[int, int] | None] | None = None

    def __init__(self) -> None:
        self.given: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        self._lanes: dict[int, SimpleQueue[int | None]] = {}

    def deal(self) -> None:
        while (item := self.given.get()) is not None:
            fd, device = item
            lane = self._lanes.get(device) or self._new_lane(device)
            if lane is None:
                _close(fd)  # no thread can be had: then the others wait for it
            else:
                lane.put(fd)
        for lane in self._lanes.values():
            lane.put(None)

    def _new_lane(self, device: int) -> SimpleQueue[int | None] | None:
        lane: SimpleQueue[int | None] = SimpleQueue()

        def close_all() -> None:
            while (fd := lane.get()) is not None:
                _close(fd)

        if started(close_all, f"closing-{device}") is None:
            return None
        self._lanes[device] = lane
        return lane


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)
