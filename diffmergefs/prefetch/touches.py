"""Which requests are first touches, and in which pieces they are brought back: numbers only."""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Iterable, Iterator

from diffmergefs.core.extents import PAGE, Extent, ExtentList

#: At most so much is pushed at once.
PIECE = 256 << 10
#: A record holds, and a push brings, at most this part of the image.
SHARE = 4

_FEWEST_JUMPS = 16
_JUMPS_OF = 8  # one request in so many is a jump, at least, where a guest runs
_WINDOW = 8 << 20
_WINDOW_OF = 16


class Touches:
    """The requests that one open file has made, as runs of pages in the order of their coming.

    A guest that is restored touches its memory here and there. Who copies or hashes a file goes
    through it in order; several requests at once may overtake each other, but all are near the
    furthest so far. One that is not is a jump. Takes 16 bytes a run.
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
        """Note a request; how many runs it added: none if it goes on where the last one ended."""
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
        """Whether it looks like a running guest, and not like a reader in order or a glance."""
        return self._jumps >= max(_FEWEST_JUMPS, self._requests / _JUMPS_OF)


def first_touches(runs: Iterable[Extent]) -> list[Extent]:
    """Each byte of the runs once, where it came first: disjoint ranges in the order of the runs."""
    # A sweep by address over the borders: of the runs that are open the earliest has the bytes.
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
    """The first of the ranges, as far as they make up no more than a quarter of an image's size."""
    room = size // SHARE // PAGE * PAGE
    found = []
    for start, stop in ranges:
        stop = min(stop, start + room)
        if start < stop:
            found.append(Extent(start, stop))
            room -= stop - start
    return found


def pieces(ranges: Iterable[Extent], size: int) -> list[Extent]:
    """What to push, in order: at most 256 KiB each, in whole pages, a quarter of the image in all.

    `ranges` are disjoint, of whole pages but where the image ends. Each is cut at the borders of
    blocks of 256 KiB. The blocks come in the order in which they were first touched, and what was
    touched of one is joined: a call costs more than a page.
    """
    blocks: dict[int, list[Extent]] = {}
    for start, stop in limited(ranges, size):
        while start < stop:
            block = start // PIECE
            end = min(stop, (block + 1) * PIECE)
            blocks.setdefault(block, []).append(Extent(start, end))
            start = end
    return [piece for parts in blocks.values() for piece in ExtentList(sorted(parts))]
