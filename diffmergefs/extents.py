"""Data extents and the one rule that merges them: numbers only, no file is ever opened here.

All ranges are half-open byte ranges `[start, stop)`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

MAX_LAYERS = 1000
_LAYER_BITS = 10
_LAYER_MASK = (1 << _LAYER_BITS) - 1


class Extent(NamedTuple):
    """The non-empty byte range `[start, stop)` of one layer that holds data."""

    start: int
    stop: int


class Segment(NamedTuple):
    """The non-empty byte range `[start, stop)` of a view that one layer supplies.

    `layer` is the layer's position in its chain (0 is the base); None means a hole in every layer:
    the bytes are zeros.
    """

    start: int
    stop: int
    layer: int | None


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

    def outside(self, other: ExtentList) -> Iterator[Extent]:
        """The ranges that are data here and not in `other`, in order."""
        # In a merge the lower layer shows where the upper one has nothing.
        for segment in SegmentMap([self, other]):
            if segment.layer == 0:
                yield Extent(segment.start, segment.stop)

    def gained_over(self, older: ExtentList) -> ExtentList | None:
        """The ranges that are data here and were holes in `older`; None if data went missing."""
        gained: list[Extent] = []
        for segment in SegmentMap([older, self]):
            if segment.layer == 0:
                return None
            if segment.layer == 1:
                gained.extend(_holes_within(older, segment.start, segment.stop))
        return ExtentList(gained)


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


def _holes_within(extents: ExtentList, start: int, stop: int) -> Iterator[Extent]:
    i = max(bisect_right(extents.starts, start) - 1, 0)
    position = start
    while i < len(extents) and extents.starts[i] < stop:
        if extents.starts[i] > position:
            yield Extent(position, extents.starts[i])
        position = max(position, extents.stops[i])
        i += 1
    if position < stop:
        yield Extent(position, stop)


class SegmentMap:
    """The merge of the layers' extents: for each byte the newest layer that has data there.

    `layers` are extent lists, base first, at most 1,000. Iterating gives the segments in order,
    without the holes that are common to all layers; neighbours of one layer are joined. At rest a
    segment takes 10 bytes (its start and its layer; it ends where the next one starts).
    """

    __slots__ = ("_owners", "_starts")

    def __init__(self, layers: Sequence[ExtentList]) -> None:
        if len(layers) > MAX_LAYERS:
            raise ValueError(f"{len(layers)} layers; at most {MAX_LAYERS} can be merged")
        self._starts, self._owners = _merge(layers)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Segment]:
        stop = self._starts[-1] if self._starts else 0
        return (s for s in self.window(0, stop) if s.layer is not None)

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the map's entries take."""
        return sum(a.itemsize * len(a) for a in (self._starts, self._owners))

    def window(self, start: int, stop: int) -> Iterator[Segment]:
        """The segments that tile `[start, stop)` exactly: sorted, never empty, holes included."""
        starts, owners = self._starts, self._owners
        i = bisect_right(starts, start)
        owner = owners[i - 1] if i else 0
        while start < stop:
            end = min(starts[i], stop) if i < len(starts) else stop
            yield Segment(start, end, owner - 1 if owner else None)
            start = end
            if i < len(starts):
                owner = owners[i]
                i += 1


def _merge(layers: Sequence[ExtentList]) -> tuple[array[int], array[int]]:
    # A sweep over all borders in ascending order. `active` has bit n set while layer n has data,
    # so its bit length is 1 + the newest such layer, and 0 where all have holes. Each border is
    # one int, offset and layer packed, so that the sort compares plain numbers and its cost, like
    # the sweep's, depends on the number of borders and not on the depth of the chain.
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
