"""A push of one image's working set: its pieces, and how they get into the page cache."""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Protocol, cast

from diffmergefs.core.errors import MountFailedError
from diffmergefs.core.extents import PAGE, Extent, ExtentList
from diffmergefs.core.sparse import page_aligned
from diffmergefs.fuse.nodes import OpenImage

log = logging.getLogger(__name__)

#: The most that is pushed at once.
PIECE = 256 << 10
#: A record and a push hold at most one part in this many of the image.
SHARE = 4


def limited(ranges: Iterable[Extent], size: int) -> list[Extent]:
    """The first of the ranges, up to a quarter of the image's size in total."""
    room = size // SHARE // PAGE * PAGE
    found = []
    for start, stop in ranges:
        stop = min(stop, start + room)
        if start < stop:
            found.append(Extent(start, stop))
            room -= stop - start
    return found


def pieces(ranges: Iterable[Extent], size: int) -> list[Extent]:
    """The pieces to push, in order: whole pages, at most 256 KiB each and a quarter of the image.

    `ranges` must be disjoint, and consist of whole pages, except at the end of the image. They are
    cut at the borders of blocks of 256 KiB. The blocks come in the order of their first touch, and
    adjacent ranges in a block are joined, because a call costs more than a page.
    """
    blocks: dict[int, list[Extent]] = {}
    for start, stop in limited(ranges, size):
        while start < stop:
            block = start // PIECE
            end = min(stop, (block + 1) * PIECE)
            blocks.setdefault(block, []).append(Extent(start, end))
            start = end
    return [piece for parts in blocks.values() for piece in ExtentList(sorted(parts))]


class Push:
    """One image's working set on its way into the page cache.

    `inode` is the inode number of the image in the mount. Once `cancelled` is set, no further step
    begins; `done` is set when no step is under way. `wanted` has the ranges once they are known,
    `whole` says that all of them were pushed, and `asked` which of them readers requested.
    """

    def __init__(self, image: OpenImage, inode: int) -> None:
        self.image = image
        self.inode = inode
        self.cancelled = False
        self.done = threading.Event()
        self.steps: Generator[int, None, None] | None = None
        self.wanted: ExtentList | None = None
        self.whole = False
        self.asked: set[int] = set()

    def note(self, offset: int, length: int) -> None:
        """A reader requested this range."""
        if self.wanted is not None:
            first = bisect_right(self.wanted.stops, offset)
            self.asked.update(range(first, bisect_left(self.wanted.starts, offset + length)))

    def hit_bytes(self) -> int:
        """How many bytes of a whole working set lie in ranges that no reader requested."""
        if self.wanted is None or not self.whole:
            return 0
        hits = (e for number, e in enumerate(self.wanted) if number not in self.asked)
        return sum(stop - start for start, stop in hits)


class Method(Protocol):
    """How pages get into the page cache. The worker thread makes all calls of `populate`."""

    def populate(self, push: Push, wanted: Sequence[Extent]) -> Generator[int, None, None]:
        """Populate the page cache in short steps. Each yields its number of bytes.

        Raises DiffMergeError and OSError. If it is closed early, it leaves no work under way.
        """
        ...

    def is_own(self, pid: int) -> bool:
        """Whether this process belongs to the method, and is no client."""
        ...


class Notify:
    """The method of `--prefetch=notify`: read the layers here, and hand the pages to the kernel.

    `store` and `is_guarded` are those of an `ObservedMount`. Without a guard nothing is stored: if
    this process died meanwhile, readers of the same pages could wait for ever.
    """

    def __init__(
        self,
        store: Callable[[int, int, bytes], None],
        is_guarded: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store = store
        self._is_guarded = is_guarded

    def populate(self, push: Push, wanted: Sequence[Extent]) -> Generator[int, None, None]:
        buffer = page_aligned(PIECE)
        for start, stop in wanted:
            data = buffer[: stop - start]
            push.image.view.fill(data, start, {})
            if push.cancelled:
                return
            if not self._is_guarded():
                raise MountFailedError("the keeper is gone; mount anew to prefetch again")
            # pyfuse3 takes any contiguous buffer, and makes no copy.
            self._store(push.inode, start, cast(bytes, data))
            yield stop - start

    def is_own(self, pid: int) -> bool:
        return False
