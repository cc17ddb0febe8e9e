"""Background threads, and closing files in them, since a filesystem may hang on close."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue


def started(work: Callable[[], object], name: str) -> threading.Thread | None:
    """A new thread that runs `work`, or None if no thread can be started (pids.max, no memory).

    The process does not wait for it at its end. Only for work that everything else can do without.
    """
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def close(fd: int, device: int) -> None:
    """Close a file of the filesystem `device` (st_dev), in a thread inside `closing_in_threads`.

    close(2) waits for the server of a network or FUSE filesystem, which may hang. Raises nothing:
    the descriptor is closed even if close(2) reports an error. A finalizer may call this, at any
    point of any code.
    """
    if (queue := _Closing.queue) is not None:
        queue.put((fd, device))
    else:
        _close(fd)


@contextmanager
def closing_in_threads() -> Iterator[None]:
    """Inside, `close` never waits: each filesystem has a thread that closes its files.

    The end of the process closes what is still open then. Contexts must not overlap.
    """
    closing = _Closing()
    if started(closing.deal, "closing") is None:
        yield
        return
    # Of all queues, only SimpleQueue allows a put in a finalizer that interrupts another put.
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
                _close(fd)  # no thread can be started, so the other filesystems wait
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
