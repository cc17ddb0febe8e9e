"""A range of an image cut into equal cells, and what each kind of content has in each.

Numbers only: no file is opened and nothing is drawn. A *kind* is a small number that the caller
gives to each range of the range (a hole, a layer, a group of layers); the higher one lies on top.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

MAX_ORDER = 10


class Grid(NamedTuple):
    """The bytes `[start, stop)` cut into cells of `cell` bytes, the first of which is at `origin`.

    `origin` is `start` rounded down to a page, so that a cell holds whole pages; the first and the
    last cell may hold less than `cell` bytes of the range.
    """

    origin: int
    start: int
    stop: int
    cell: int

    @property
    def cells(self) -> int:
        """The number of cells; each of them has at least one byte of the range."""
        return -(-(self.stop - self.origin) // self.cell)

    def bytes_in(self, number: int) -> int:
        """How many bytes of the range cell `number` holds."""
        first = self.origin + number * self.cell
        return min(first + self.cell, self.stop) - max(first, self.start)


def row_grid(start: int, stop: int, page: int, columns: int) -> Grid:
    """A grid of at most `columns` cells, each of as few whole pages as that allows."""
    origin, pages = _in_pages(start, stop, page)
    return Grid(origin, start, stop, -(-pages // columns) * page)


def square_grid(start: int, stop: int, page: int) -> tuple[int, Grid]:
    """The order of a square of `2**order` cells a side, and the grid of which it has room for all.

    The order is the smallest with at most one page a cell, and 10 (1024 x 1024 cells) at most;
    beyond that a cell holds as few whole pages as are needed.
    """
    origin, pages = _in_pages(start, stop, page)
    order = min((pages - 1).bit_length() + 1 >> 1, MAX_ORDER)
    return order, Grid(origin, start, stop, -(-pages // 4**order) * page)


def _in_pages(start: int, stop: int, page: int) -> tuple[int, int]:
    if not 0 <= start < stop:
        raise ValueError(f"the range [{start}, {stop}) is empty or negative")
    origin = start - start % page
    return origin, -(-(stop - origin) // page)


class Run(NamedTuple):
    """Cells `[first, last)`, each of which has `nbytes` of one kind from one range."""

    first: int
    last: int
    kind: int
    nbytes: int


def runs(ranges: Iterable[tuple[int, int, int]], grid: Grid) -> Iterator[Run]:
    """The ranges `(start, stop, kind)`, which lie in the grid's range, cut at the cells' borders.

    Neighbouring cells that a range fills are one run, so the cost is that of the ranges.
    """
    for start, stop, kind in ranges:
        first, last = (start - grid.origin) // grid.cell, (stop - 1 - grid.origin) // grid.cell
        if first == last:
            yield Run(first, first + 1, kind, stop - start)
            continue
        second = grid.origin + (first + 1) * grid.cell
        yield Run(first, first + 1, kind, second - start)
        if first + 1 < last:
            yield Run(first + 1, last, kind, grid.cell)
        yield Run(last, last + 1, kind, stop - (grid.origin + last * grid.cell))


def bytes_by_kind(
    ranges: Iterable[tuple[int, int, int]], grid: Grid, kinds: int
) -> list[array[int]]:
    """For each of the kinds `0 ... kinds - 1` how many bytes it has in each cell."""
    rows = [array("Q", bytes(8 * grid.cells)) for _ in range(kinds)]
    for first, last, kind, nbytes in runs(ranges, grid):
        row = rows[kind]
        for number in range(first, last):
            row[number] += nbytes
    return rows


class Tops(NamedTuple):
    """For each cell the highest kind in it and how many bytes that has there.

    `totals` are the bytes that each kind has in the whole range.
    """

    kinds: array[int]
    nbytes: array[int]
    totals: list[int]


def tops(ranges: Iterable[tuple[int, int, int]], grid: Grid, kinds: int) -> Tops:
    """The `Tops` of ranges that tile the grid's range, of at most 256 kinds."""
    found = Tops(array("B", bytes(grid.cells)), array("Q", bytes(8 * grid.cells)), [0] * kinds)
    for first, last, kind, nbytes in runs(ranges, grid):
        found.totals[kind] += (last - first) * nbytes
        if last - first > 1:  # they hold nothing else
            found.kinds[first:last] = array("B", [kind]) * (last - first)
            found.nbytes[first:last] = array("Q", [nbytes]) * (last - first)
        else:
            _raise_cell(found, first, kind, nbytes)
    return found


def _raise_cell(found: Tops, number: int, kind: int, nbytes: int) -> None:
    if kind > found.kinds[number]:
        found.kinds[number], found.nbytes[number] = kind, nbytes
    elif kind == found.kinds[number]:
        found.nbytes[number] += nbytes


def level(part: int, whole: int, unit: int, levels: int) -> int:
    """How strongly `part` of `whole` bytes is drawn, on a logarithmic scale: 0 to `levels`.

    0 is nothing at all and `levels` is the whole, and nothing else is either; 1 is one `unit` (a
    page) or less. Requires `levels` of 2 at least.
    """
    if part <= 0:
        return 0
    if part >= whole:
        return levels
    if part <= unit:
        return 1
    share = math.log(part / unit) / math.log(whole / unit)
    return 1 + min(int((levels - 1) * share), levels - 2)
