"""First touches among requests, and the pieces in which they are prefetched: numbers only."""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Iterable, Iterator

from diffmergefs.core.extents import PAGE, Extent, ExtentList

#: The most that is pushed at once.
PIECE = 256 << 10
#: A record and a push hold at most one part in this many of the image.
SHARE = 4

_FEWEST_JUMPS = 16
_JUMPS_OF = 8  # if a guest runs, at least one request in this many is a jump
_WINDOW = 8 << 20
_WINDOW_OF = 16


class Touches:
    """The requests of one open file, as runs of pages in the order of arrival.

    A restored guest touches its memory in random places. A reader that copies or hashes a file goes
    through it in order: parallel requests may overtake each other, but all are near the furthest so
    far. A request that is not near it is a jump. Takes 16 bytes per run.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._window = min(_WINDOW, size // _WINDOW_OF)
        self._starts, self._stops = array("Q"), array("Q")
        self._requests = self._jumps = self._furthest = 0

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Extent]:
        return map(Extent, self._starts, self._stops)

    def add(self, offset: int, length: int) -> int:
        """Add a request, and return how many runs that added: 0 if it continues the last run."""
        start = offset // PAGE * PAGE
        stop = min(-(-(offset + length) // PAGE) * PAGE, self._size)
        if start >= stop:
            return 0
        self._requests += 1
        self._jumps += abs(start - self._furthest) > self._window
        self._furthest = max(self._furthest, stop)
        if self._stops and self._stops[-1] == start:
            self._stops[-1] = stop
            return 0
        self._starts.append(start)
        self._stops.append(stop)
        return 1

    @property
    def is_restore(self) -> bool:
        """Whether the requests look like a running guest, not like a sequential or short reader."""
        return self._jumps >= max(_FEWEST_JUMPS, self._requests / _JUMPS_OF)


def first_touches(runs: Iterable[Extent]) -> list[Extent]:
    """Each byte of the runs once, at its first place: disjoint ranges in the order of the runs."""
    # A sweep over the borders by address: the earliest of the runs that are open has the bytes.
    numbered = list(enumerate(runs))
    borders = sorted({border for _, run in numbered for border in run})
    waiting = sorted((run.start, number, run.stop) for number, run in numbered)[::-1]
    opened: list[tuple[int, int]] = []
    found: list[tuple[int, int, int]] = []
    for start, stop in itertools.pairwise(borders):
        while waiting and waiting[-1][0] <= start:
            _, number, end = waiting.pop()
            heapq.heappush(opened, (number, end))
        while opened and opened[0][1] <= start:
            heapq.heappop(opened)
        if opened:
            number = opened[0][0]
            if found and found[-1][0] == number and found[-1][2] == start:
                found[-1] = (number, found[-1][1], stop)
            else:
                found.append((number, start, stop))
    return [Extent(start, stop) for _, start, stop in sorted(found)]


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
