"""Prefetch: an opened image's recorded working set goes into the page cache."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import weakref
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from diffmergefs.core import workers
from diffmergefs.core.errors import DiffMergeError, LayerChangedError
from diffmergefs.core.extents import Extent, ExtentList
from diffmergefs.core.identity import FileKey
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.handles import Observer
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.prefetch.push import Method, Push, pieces
from diffmergefs.prefetch.record import Identity, WorkingSets, identity_of_view

log = logging.getLogger(__name__)

_LONGEST_WAIT_SECONDS = 5.0


@dataclass(eq=False)
class _Opened:
    # An image with open files. `pushes` may include some that are done.
    image: OpenImage
    inode: int
    files: set[int] = field(default_factory=set)
    pushes: list[Push] = field(default_factory=list)

    @property
    def is_pushed(self) -> bool:
        return any(not push.done.is_set() for push in self.pushes)


class _Known(NamedTuple):
    # An image's record, prepared: reading it again takes milliseconds, while a client waits for its
    # first page. `borders` are the starts and stops of the pieces in turn, in the order of their
    # first touches: 16 bytes a piece, a tenth of what a list takes.
    record: FileKey | None
    borders: array[int]
    ranges: ExtentList


class Prefetcher(Observer):
    """An `Observer` that puts recorded working sets into the page cache.

    One worker thread does all the work, a piece of each image in turn. It pushes an image at its
    first open, and again if a file that was opened later requests a page of the working set: then
    the kernel has dropped it. If a file is opened for writing, the push waits for its first
    request, because the kernel drops an image's pages when such a file is mapped. A push ends at
    the last close of its image, and when a layer changes. A record that is stale or unusable is
    ignored, with a line in the log.

    `pushes` counts those that were completed, and `pushed_bytes` all bytes that were pushed.
    `hit_bytes` counts, at the last close of an image, the bytes of a complete push in pieces of
    which no reader requested any part: they came from the page cache, or were not touched. `stop`
    calls `abort`, which ends the connection to the kernel, if a push does not end.
    """

    def __init__(
        self, sets: WorkingSets, method: Method, abort: Callable[[], None] | None = None
    ) -> None:
        self._sets = sets
        self._method = method
        self._abort = abort
        # Only for the event loop:
        self._images: dict[OpenImage, _Opened] = {}
        self._files: dict[int, _Opened] = {}
        self._waiting: dict[int, bool] = {}  # files whose requests count -> is it for writing?
        # Shared with the worker, under the lock; nobody blocks while holding it:
        self._changed = threading.Condition()
        self._queue: deque[Push] = deque()
        self._known: weakref.WeakKeyDictionary[OpenImage, _Known] = weakref.WeakKeyDictionary()
        self._busy: Push | None = None
        self._ending = False
        self._worker: threading.Thread | None = None
        # Only the worker changes these:
        self.pushes = self.pushed_bytes = 0
        self.hit_bytes = 0
        self._logged: set[str] = set()

    def opened(self, file: int, inode: int, image: OpenImage, pid: int, *, writing: bool) -> bool:
        if self._method.is_own(pid):
            return True
        opened = self._images.setdefault(image, _Opened(image, inode))
        is_first = not opened.files
        opened.files.add(file)
        self._files[file] = opened
        with self._changed:
            was_pushed = image in self._known
        if writing or was_pushed:
            self._waiting[file] = writing
        elif is_first:
            self._begin(opened)
        return True

    def read(self, file: int, offset: int, length: int) -> None:
        opened = self._files.get(file)
        if opened is None:
            return
        if opened.pushes:
            opened.pushes[-1].note(offset, length)
        if file in self._waiting and self._is_wanted(opened.image, offset, length):
            writing = self._waiting.pop(file)
            if writing:
                # The kernel has dropped what was pushed so far.
                self._cancel(opened)
            if not opened.is_pushed or writing:
                self._begin(opened)

    def closed(self, file: int) -> Callable[[], object] | None:
        self._waiting.pop(file, None)
        opened = self._files.pop(file, None)
        if opened is None:
            return None
        opened.files.discard(file)
        if opened.files:
            return None
        del self._images[opened.image]
        self._cancel(opened)
        self.hit_bytes += sum(push.hit_bytes() for push in opened.pushes)
        return functools.partial(_wait, opened.pushes) if opened.is_pushed else None

    def stop(self, seconds: float) -> bool:
        with self._changed:
            self._ending = True
            for push in [*self._queue, *([self._busy] if self._busy else [])]:
                push.cancelled = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join(seconds)
            if self._worker.is_alive() and self._abort is not None:
                # It waits for a page of a request whose storage hangs. The kernel can end that.
                self._abort()
                self._worker.join(seconds)
            return not self._worker.is_alive()
        return True

    def _is_wanted(self, image: OpenImage, offset: int, length: int) -> bool:
        with self._changed:
            known = self._known.get(image)
        if known is None:
            return True
        ranges = known.ranges
        before = bisect_left(ranges.starts, offset + length)
        return before > 0 and ranges.stops[before - 1] > offset

    def _cancel(self, opened: _Opened) -> None:
        with self._changed:
            for push in opened.pushes:
                push.cancelled = True

    def _begin(self, opened: _Opened) -> None:
        push = Push(opened.image, opened.inode)
        push.steps = self._steps(push)
        if self._worker is None and not self._ending:
            # If storage hangs, the process must still be able to end.
            self._worker = workers.started(self._work, "prefetch")
        with self._changed:
            if self._ending or self._worker is None:
                return
            self._queue.append(push)
            self._changed.notify_all()
        self.hit_bytes += sum(p.hit_bytes() for p in opened.pushes if p.done.is_set())
        opened.pushes = [*(p for p in opened.pushes if not p.done.is_set()), push]

    # In the worker thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ending)
                if not self._queue:
                    return
                push = self._busy = self._queue.popleft()
            goes_on = self._step(push)
            with self._changed:
                self._busy = None
                if goes_on:
                    self._queue.append(push)
            if not goes_on:
                push.steps = None  # it holds the push, which holds the image
                push.done.set()
            del push

    def _step(self, push: Push) -> bool:
        name = push.image.view.layers[-1].path
        assert push.steps is not None
        try:
            if push.cancelled:
                push.steps.close()
                return False
            next(push.steps)
        except StopIteration:
            return False
        except (DiffMergeError, OSError) as error:
            if not push.cancelled:
                log.info("%s: prefetch ends: %s", name, error)
            return False
        except Exception:
            log.exception("%s: prefetch failed: this is a bug", name)
            return False
        return True

    def _steps(self, push: Push) -> Generator[int, None, None]:
        wanted, push.wanted = self._wanted(push.image)
        if not wanted:
            return
        total, view = 0, push.image.view
        _require_unchanged(view)
        with contextlib.closing(self._method.populate(push, wanted)) as steps:
            for count in steps:
                total += count
                self.pushed_bytes += count
                yield count
                _require_unchanged(view)
        if not push.cancelled:
            push.whole = True
            self.pushes += 1
            name = view.layers[-1].path
            log.info("%s: prefetched %d bytes in %d pieces", name, total, len(wanted))

    def _wanted(self, image: OpenImage) -> tuple[list[Extent], ExtentList]:
        layers = identity_of_view(image.view)
        # Ask for the key first, so that a record that is replaced meanwhile is read again.
        record = self._sets.key(layers)
        with self._changed:
            known = self._known.get(image)
        if known is None or known.record != record:
            found = self._load(layers, image.view.size)
            borders = array("Q", itertools.chain.from_iterable(found))
            known = _Known(record, borders, ExtentList(sorted(found)))
            with self._changed:
                if found:
                    self._known[image] = known
                else:
                    self._known.pop(image, None)
        return list(map(Extent, known.borders[::2], known.borders[1::2])), known.ranges

    def _load(self, layers: Identity, size: int) -> list[Extent]:
        try:
            record = self._sets.load(layers)
        except DiffMergeError as error:
            self._warn(f"{error}: the record is ignored")
            return []
        if record is None:
            return []
        if reason := record.stale(layers):
            self._warn(f"{self._sets.path(layers)}: stale, and ignored: {reason}")
            return []
        return pieces(record.ranges, size)

    def _warn(self, text: str) -> None:
        # Once, however often the image is opened.
        if text not in self._logged:
            self._logged.add(text)
            log.warning("%s", text)


def _require_unchanged(view: MergedView) -> None:
    # All layers count, also for pieces that others supply: no reader gets those any more.
    for layer in view.layers:
        if layer.tainted:
            raise LayerChangedError(f"{layer.path}: changed while in use: {layer.tainted}")


def _wait(pushes: Sequence[Push]) -> None:
    # With a limit: a push whose storage hangs must not keep the mount from ending. It stores
    # nothing more.
    for push in pushes:
        push.done.wait(_LONGEST_WAIT_SECONDS)
