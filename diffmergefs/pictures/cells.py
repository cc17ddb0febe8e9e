"""A range of an image cut into equal cells, and how much each kind of content has in each.

Only numbers: nothing is opened or drawn. A *kind* is a small number that the caller gives to each
part of the range (a hole, a layer, a group of layers); higher kinds lie on top.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

MAX_ORDER = 10


class Grid(NamedTuple):
    """The bytes `[start, stop)` cut into cells of `cell` bytes; the first cell begins at `origin`.

    `origin` is `start` rounded down to a page, so that cells hold whole pages. The first and the
    last cell may hold less than `cell` bytes of the range.
    """

    origin: int
    start: int
    stop: int
    cell: int

    @property
    def cells(self) -> int:
        """The number of cells; each has at least one byte of the range."""
        return -(-(self.stop - self.origin) // self.cell)

    def bytes_in(self, number: int) -> int:
        """How many bytes of the range are in cell `number`."""
        first = self.origin + number * self.cell
        return min(first + self.cell, self.stop) - max(first, self.start)


def row_grid(start: int, stop: int, page: int, columns: int) -> Grid:
    """A grid of at most `columns` cells, each with as few whole pages as possible."""
    origin, pages = _in_pages(start, stop, page)
    return Grid(origin, start, stop, -(-pages // columns) * page)


def square_grid(start: int, stop: int, page: int) -> tuple[int, Grid]:
    """The order of a square of `2**order` cells a side, and a grid whose cells fit in it.

    The order is the smallest with at most one page per cell, up to 10 (1024 x 1024 cells). For more
    pages, each cell has as few whole pages as possible.
    """
    origin, pages = _in_pages(start, stop, page)
    order = min((pages - 1).bit_length() + 1 >> 1, MAX_ORDER)
    return order, Grid(origin, start, stop, -(-pages // 4**order) * page)


def _in_pages(start: int, stop: int, page: int) -> tuple[int, int]:
    if not 0 <= start < stop:
        raise ValueError(f"the range [{start}, {stop}) is empty or negative")
    origin = start - start % page
    return origin, -(-(stop - origin) // page)


def runs(ranges: Iterable[tuple[int, int, int]], grid: Grid) -> Iterator[tuple[int, int, int, int]]:
    """The ranges `(start, stop, kind)` inside the grid, cut at the borders of cells.

    Each run `(first, last, kind, nbytes)` is the cells `[first, last)`, each with `nbytes` of one
    kind from one range. Neighbouring cells that a range fills are one run, so the cost depends on
    the ranges alone.
    """
    for start, stop, kind in ranges:
        first, last = (start - grid.origin) // grid.cell, (stop - 1 - grid.origin) // grid.cell
        if first == last:
            yield first, first + 1, kind, stop - start
            continue
        second = grid.origin + (first + 1) * grid.cell
        yield first, first + 1, kind, second - start
        if first + 1 < last:
            yield first + 1, last, kind, grid.cell
        yield last, last + 1, kind, stop - (grid.origin + last * grid.cell)


def bytes_by_kind(
    ranges: Iterable[tuple[int, int, int]], grid: Grid, kinds: int
) -> list[array[int]]:
    """For each kind `0 ... kinds - 1`, its bytes in each cell."""
    rows = [array("Q", bytes(8 * grid.cells)) for _ in range(kinds)]
    for first, last, kind, nbytes in runs(ranges, grid):
        row = rows[kind]
        for number in range(first, last):
            row[number] += nbytes
    return rows


class Tops(NamedTuple):
    """For each cell its highest kind, and the bytes of that kind there.

    `totals` has the bytes of each kind in the whole range.
    """

    kinds: array[int]
    nbytes: array[int]
    totals: list[int]


def tops(ranges: Iterable[tuple[int, int, int]], grid: Grid, kinds: int) -> Tops:
    """The `Tops` of ranges that tile the grid, with at most 256 kinds."""
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
    """The strength of `part` of `whole` bytes on a logarithmic scale, 0 to `levels` (at least 2).

    Only nothing is 0, and only the whole is `levels`; up to one `unit` (a page) is 1.
    """
    if part <= 0:
        return 0
    if part >= whole:
        return levels
    if part <= unit:
        return 1
    share = math.log(part / unit) / math.log(whole / unit)
    return 1 + min(int((levels - 1) * share), levels - 2)
