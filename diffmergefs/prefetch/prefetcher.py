"""Prefetch: what a working set records is brought into the page cache when its image is opened."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import weakref
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, cast

from diffmergefs.core import background
from diffmergefs.core.buffers import page_aligned
from diffmergefs.core.errors import DiffMergeError, LayerChangedError
from diffmergefs.core.extents import Extent, ExtentList
from diffmergefs.core.identity import FileKey
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.fuse.observer import Caller
from diffmergefs.prefetch.connection import Connection
from diffmergefs.prefetch.record import Identity, WorkingSets, identity_of_view
from diffmergefs.prefetch.touches import PIECE, pieces

log = logging.getLogger(__name__)

_LONGEST_WAIT_SECONDS = 5.0


class Push:
    """One image's working set on its way into the page cache.

    `inode` is the image's number in the mount. Once `cancelled` is set, nothing more is begun;
    `done` is set when nothing is under way any more. `wanted` are the ranges once they are known,
    `whole` says that all of them were brought, and `asked` which of them readers asked for.
    """

    def __init__(self, shown: OpenImage, inode: int) -> None:
        self.shown = shown
        self.inode = inode
        self.cancelled = False
        self.done = threading.Event()
        self.steps: Generator[int, None, None] | None = None
        self.wanted: ExtentList | None = None
        self.whole = False
        self.asked: set[int] = set()

    def note(self, offset: int, length: int) -> None:
        """A reader asked for this range."""
        if self.wanted is not None:
            first = bisect_right(self.wanted.stops, offset)
            self.asked.update(range(first, bisect_left(self.wanted.starts, offset + length)))

    def hit_bytes(self) -> int:
        """How many bytes of a whole working set lie in ranges that no reader asked for."""
        if self.wanted is None or not self.whole:
            return 0
        hits = (e for number, e in enumerate(self.wanted) if number not in self.asked)
        return sum(stop - start for start, stop in hits)


class Way(Protocol):
    """How pages are brought into the page cache; always called in the worker thread."""

    def bring(self, push: Push, wanted: Sequence[Extent]) -> Generator[int, None, None]:
        """Bring them step by step, each of which takes moments; after each, how many bytes.

        Raises DiffMergeError, OSError. Closed early, it leaves nothing under way.
        """
        ...

    def is_own(self, pid: int) -> bool:
        """Whether this process is a part of it."""
        ...


class Notify:
    """The way of `--prefetch=notify`: the layers are read here, and the pages handed to the kernel.

    `store` is `ObservedMount.store_pages`.
    """

    def __init__(self, store: Callable[[int, int, bytes], None]) -> None:
        self._store = store

    def bring(self, push: Push, wanted: Sequence[Extent]) -> Generator[int, None, None]:
        view = push.shown.view
        buffer = page_aligned(PIECE)
        for start, stop in wanted:
            data = buffer[: stop - start]
            view.fill(data, start, {})
            if push.cancelled:
                return
            # A contiguous buffer is all that is needed: no copy is made of it.
            self._store(push.inode, start, cast(bytes, data))
            yield stop - start

    def is_own(self, pid: int) -> bool:
        return False


@dataclass(eq=False)
class _Opened:
    # An image of which files are open; `pushes` are those that may not be done yet.
    shown: OpenImage
    inode: int
    files: set[int] = field(default_factory=set)
    pushes: list[Push] = field(default_factory=list)

    @property
    def is_pushed(self) -> bool:
        return any(not push.done.is_set() for push in self.pushes)


class _Known(NamedTuple):
    # What is made of an image's record, and of which one: to read it anew takes milliseconds, while
    # a client waits for its first page. `borders` are the pieces' starts and stops in turn, in the
    # order of their first touches: 16 bytes a piece, where a list of them takes ten times as much.
    record: FileKey | None
    borders: array[int]
    ranges: ExtentList


class Prefetcher:
    """An `Observer` that brings recorded working sets into the page cache.

    Everything is done in one worker thread, a piece of each image in turn. An image is pushed at
    its first open, and again when a file that was opened later asks for a page of the working set:
    then the kernel has dropped it. A file that is opened for writing is waited for until its
    first request, since the kernel drops an image's pages when such a file is mapped. At an
    image's last close its push ends, and so does one whose layers changed. A record that is stale,
    or that cannot be used, is ignored with a line in the log. `pushes` counts those that were
    made to their end, and `pushed_bytes` what was brought in all. `hit_bytes` are those of whole
    working sets of which no reader asked for any part until the image's last close, when they are
    counted: they came from the page cache, or were not touched. `stop` aborts the `connection` if a
    push does not end, and `close` closes it.
    """

    def __init__(self, sets: WorkingSets, way: Way, connection: Connection | None = None) -> None:
        self._sets = sets
        self._way = way
        self._connection = connection
        # Only the event loop's:
        self._images: dict[OpenImage, _Opened] = {}
        self._files: dict[int, _Opened] = {}
        self._waiting: dict[int, bool] = {}  # files whose requests count -> is it for writing?
        # Shared with the worker, under the lock, which nobody holds while anything blocks:
        self._changed = threading.Condition()
        self._queue: deque[Push] = deque()
        self._known: weakref.WeakKeyDictionary[OpenImage, _Known] = weakref.WeakKeyDictionary()
        self._busy: Push | None = None
        self._ending = False
        self._worker: threading.Thread | None = None
        # Changed by the worker only:
        self.pushes = self.pushed_bytes = 0
        self.hit_bytes = 0
        self._said: set[str] = set()

    def opened(
        self, file: int, inode: int, shown: OpenImage, caller: Caller, *, writing: bool
    ) -> bool:
        if self._way.is_own(caller.pid):
            return True
        image = self._images.setdefault(shown, _Opened(shown, inode))
        is_first = not image.files
        image.files.add(file)
        self._files[file] = image
        with self._changed:
            was_pushed = shown in self._known
        if writing or was_pushed:
            self._waiting[file] = writing
        elif is_first:
            self._begin(image)
        return True

    def read(self, file: int, offset: int, length: int) -> None:
        image = self._files.get(file)
        if image is None:
            return
        if image.pushes:
            image.pushes[-1].note(offset, length)
        if file in self._waiting and self._is_wanted(image.shown, offset, length):
            writing = self._waiting.pop(file)
            if writing:
                # What was pushed so far is gone.
                self._cancel(image)
            if not image.is_pushed or writing:
                self._begin(image)

    def closed(self, file: int) -> Callable[[], object] | None:
        self._waiting.pop(file, None)
        image = self._files.pop(file, None)
        if image is None:
            return None
        image.files.discard(file)
        if image.files:
            return None
        del self._images[image.shown]
        self._cancel(image)
        self.hit_bytes += sum(push.hit_bytes() for push in image.pushes)
        return functools.partial(_wait, image.pushes) if image.is_pushed else None

    def stop(self, seconds: float) -> bool:
        with self._changed:
            self._ending = True
            for push in [*self._queue, *([self._busy] if self._busy else [])]:
                push.cancelled = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join(seconds)
            if self._worker.is_alive() and self._connection is not None:
                # It waits for a page of a request whose storage hangs. The kernel can end that.
                self._connection.abort()
                self._worker.join(seconds)
            return not self._worker.is_alive()
        return True

    def ready(self, readahead_kib: int | None) -> None:
        pass

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _is_wanted(self, shown: OpenImage, offset: int, length: int) -> bool:
        with self._changed:
            known = self._known.get(shown)
        if known is None:
            return True
        ranges = known.ranges
        before = bisect_left(ranges.starts, offset + length)
        return before > 0 and ranges.stops[before - 1] > offset

    def _cancel(self, image: _Opened) -> None:
        with self._changed:
            for push in image.pushes:
                push.cancelled = True

    def _begin(self, image: _Opened) -> None:
        push = Push(image.shown, image.inode)
        push.steps = self._steps(push)
        if self._worker is None and not self._ending:
            # Where storage hangs, the process must be able to end all the same.
            self._worker = background.started(self._work, "prefetch")
        with self._changed:
            if self._ending or self._worker is None:
                return
            self._queue.append(push)
            self._changed.notify_all()
        self.hit_bytes += sum(p.hit_bytes() for p in image.pushes if p.done.is_set())
        image.pushes = [*(p for p in image.pushes if not p.done.is_set()), push]

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
        name = push.shown.view.layers[-1].path
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
        wanted, push.wanted = self._wanted(push.shown)
        if not wanted:
            return
        total, view = 0, push.shown.view
        _require_unchanged(view)
        with contextlib.closing(self._way.bring(push, wanted)) as steps:
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

    def _wanted(self, shown: OpenImage) -> tuple[list[Extent], ExtentList]:
        layers = identity_of_view(shown.view)
        # Looked at first: a record that is replaced meanwhile is then read once more.
        record = self._sets.key(layers)
        with self._changed:
            known = self._known.get(shown)
        if known is None or known.record != record:
            found = self._load(layers, shown.view.size)
            borders = array("Q", itertools.chain.from_iterable(found))
            known = _Known(record, borders, ExtentList(sorted(found)))
            with self._changed:
                if found:
                    self._known[shown] = known
                else:
                    self._known.pop(shown, None)
        return list(map(Extent, known.borders[::2], known.borders[1::2])), known.ranges

    def _load(self, layers: Identity, size: int) -> list[Extent]:
        try:
            record = self._sets.load(layers)
        except DiffMergeError as error:
            self._say(f"{error}: the record is ignored")
            return []
        if record is None:
            return []
        if reason := record.stale(layers):
            self._say(f"{self._sets.path(layers)}: stale, and ignored: {reason}")
            return []
        return pieces(record.ranges, size)

    def _say(self, text: str) -> None:
        # Once, however often the image is opened.
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


def _require_unchanged(view: MergedView) -> None:
    # Whatever is asked of it: what the other layers supply will not be asked for any more.
    for layer in view.layers:
        if layer.tainted:
            raise LayerChangedError(f"{layer.path}: changed while in use: {layer.tainted}")


def _wait(pushes: Sequence[Push]) -> None:
    # Not for ever: one that reads from storage that hangs must not keep the mount from ending. It
    # stores nothing any more.
    for push in pushes:
        push.done.wait(_LONGEST_WAIT_SECONDS)
