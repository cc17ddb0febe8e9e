"""Data extents and the one rule that merges them. Only numbers: nothing here opens a file.

All ranges are half-open byte ranges `[start, stop)`.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

#: Bytes in a page of guest memory, unless the user names another page size.
PAGE = 4096
MIB = 1 << 20
MAX_LAYERS = 1000
_LAYER_BITS = 10
_LAYER_MASK = (1 << _LAYER_BITS) - 1


class Extent(NamedTuple):
    """The non-empty byte range `[start, stop)` of one layer that holds data."""

    start: int
    stop: int


class Segment(NamedTuple):
    """The non-empty byte range `[start, stop)` of a view that one layer supplies.

    `layer` is the layer's position in its chain (0 is the base). None means a hole in every layer:
    the bytes are zeros.
    """

    start: int
    stop: int
    layer: int | None


def is_aligned(start: int, stop: int, unit: int, size: int) -> bool:
    """Whether a range of a file of `size` bytes has its borders on multiples of `unit`.

    A range that stops at the end of the file may stop anywhere.
    """
    return start % unit == 0 and (stop % unit == 0 or stop == size)


class ExtentList:
    """The data extents of one layer: sorted, disjoint, adjacent ones joined; 16 bytes each.

    Takes extents in ascending order; raises ValueError for an empty, negative, overlapping or
    unordered one.
    """

    __slots__ = ("starts", "stops")

    def __init__(self, extents: Iterable[tuple[int, int]] = ()) -> None:
        self.starts = array("Q")
        self.stops = array("Q")
        last = -1
        for start, stop in extents:
            if start < 0 or stop <= start or start < last:
                raise ValueError(f"extent [{start}, {stop}) is empty or out of order")
            if start == last:
                self.stops[-1] = stop
            else:
                self.starts.append(start)
                self.stops.append(stop)
            last = stop

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Extent]:
        return map(Extent, self.starts, self.stops)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExtentList):
            return NotImplemented
        return self.starts == other.starts and self.stops == other.stops

    __hash__ = None  # type: ignore[assignment]

    @property
    def data_bytes(self) -> int:
        """How many bytes the extents hold."""
        return sum(self.stops) - sum(self.starts)

    def covers(self, size: int) -> bool:
        """Whether the extents leave no hole in `[0, size)`."""
        return len(self) == 1 and self.starts[0] == 0 and self.stops[0] >= size

    def intersection(self, other: ExtentList) -> ExtentList:
        """The ranges that are data in both."""
        return ExtentList(_common(self, other))

    def outside(self, *others: ExtentList) -> Iterator[Extent]:
        """The ranges that are data here and in none of the `others`, in order."""
        # In a merge the lowest layer supplies the bytes where the upper ones have no data.
        for segment in SegmentMap([self, *others]):
            if segment.layer == 0:
                yield Extent(segment.start, segment.stop)


def split(start: int, stop: int, unit: int) -> list[tuple[int, int]]:
    """The range `[start, stop)` in parts, split at multiples of `unit`."""
    borders = [start, *range(start - start % unit + unit, stop, unit), stop]
    return list(itertools.pairwise(borders)) if start < stop else []


def _common(a: ExtentList, b: ExtentList) -> Iterator[tuple[int, int]]:
    i = j = 0
    while i < len(a) and j < len(b):
        start, stop = max(a.starts[i], b.starts[j]), min(a.stops[i], b.stops[j])
        if start < stop:
            yield start, stop
        if a.stops[i] < b.stops[j]:
            i += 1
        else:
            j += 1


class SegmentMap:
    """The merge of the layers' extents: for each byte, the newest layer that has data there.

    `layers` are extent lists, base first, at most 1,000. Iteration yields the segments in order,
    without the holes common to all layers; neighbours of one layer are joined. In memory a segment
    takes 10 bytes: its start and its layer (it ends where the next one starts).
    """

    __slots__ = ("__weakref__", "_owners", "_starts")

    def __init__(self, layers: Sequence[ExtentList]) -> None:
        if len(layers) > MAX_LAYERS:
            raise ValueError(f"{len(layers)} layers; at most {MAX_LAYERS} can be merged")
        self._starts, self._owners = _merge(layers)

    def under(self, newer: ExtentList, number: int) -> SegmentMap:
        """The merge of the same layers and a newer one, whose position in the chain is `number`.

        It takes a microsecond or two per extent of the newer layer, whatever is below. This map
        does not change.
        """
        merged = SegmentMap(())
        merged._starts, merged._owners = _overlay(self._starts, self._owners, newer, number + 1)
        return merged

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Segment]:
        stop = self._starts[-1] if self._starts else 0
        return (Segment(*s) for s in self.window(0, stop) if s[2] is not None)

    @property
    def nbytes(self) -> int:
        """How many bytes of memory the map's entries take."""
        return sum(a.itemsize * len(a) for a in (self._starts, self._owners))

    def owned_bytes(self, layers: int) -> list[int]:
        """How many bytes each of the first `layers` layers supplies."""
        owned = [0] * (layers + 1)
        for start, stop, owner in zip(self._starts, self._starts[1:], self._owners, strict=False):
            owned[owner] += stop - start
        return owned[1:]

    def window(self, start: int, stop: int) -> Iterable[tuple[int, int, int | None]]:
        """The segments that tile `[start, stop)` exactly: sorted, never empty, holes included.

        They are plain tuples in the order of `Segment`: every read comes through here, and making
        a `Segment` takes longer than the search.
        """
        starts = self._starts
        i = bisect_right(starts, start)
        owner = self._owners[i - 1] if i else 0
        if start < stop and (i == len(starts) or stop <= starts[i]):
            # Most windows are one page in one segment. A generator would take longer than the
            # search.
            return ((start, stop, owner - 1 if owner else None),)
        return self._tiles(i, owner, start, stop)

    def _tiles(
        self, i: int, owner: int, start: int, stop: int
    ) -> Iterator[tuple[int, int, int | None]]:
        starts, owners, last = self._starts, self._owners, len(self._starts)
        while start < stop:
            end = starts[i] if i < last else stop
            if end > stop:
                end = stop
            yield start, end, owner - 1 if owner else None
            start = end
            if i < last:
                owner = owners[i]
                i += 1


def _merge(layers: Sequence[ExtentList]) -> tuple[array[int], array[int]]:
    # A sweep over all borders in ascending order. `active` has bit n set while layer n has data,
    # so its bit length is 1 + the newest such layer, or 0 where all have holes. Each border is one
    # int, offset and layer packed, so that the sort compares plain numbers. The cost of sort and
    # sweep depends on the number of borders, not on the depth of the chain.
    borders: list[int] = []
    for n, extents in enumerate(layers):
        borders.extend([offset << _LAYER_BITS | n for offset in extents.starts])
        borders.extend([offset << _LAYER_BITS | n for offset in extents.stops])
    borders.sort()
    bits = [1 << n for n in range(len(layers))]
    starts, owners = array("Q"), array("H")
    active = owner = 0
    for border in borders:
        active ^= bits[border & _LAYER_MASK]
        newest = active.bit_length()
        if newest == owner:
            continue
        offset = border >> _LAYER_BITS
        if starts and starts[-1] == offset:
            starts.pop()
            owners.pop()
        if newest != (owners[-1] if owners else 0):
            starts.append(offset)
            owners.append(newest)
        owner = newest
    return starts, owners


def _overlay(
    starts: array[int], owners: array[int], newer: ExtentList, owner: int
) -> tuple[array[int], array[int]]:
    # What is between two extents of the newer layer is copied in one piece. This makes no adjacent
    # segments of one owner: there were none before, and the new owner is in none of the pieces.
    new_starts, new_owners = array("Q"), array("H")
    position = 0  # the first border that was neither copied nor covered by the newer layer
    for start, stop in zip(newer.starts, newer.stops, strict=True):
        border = bisect_left(starts, start, position)
        new_starts += starts[position:border]
        new_owners += owners[position:border]
        position = bisect_right(starts, stop, border)
        new_starts.append(start)
        new_owners.append(owner)
        new_starts.append(stop)
        new_owners.append(owners[position - 1] if position else 0)
    new_starts += starts[position:]
    new_owners += owners[position:]
    return new_starts, new_owners
