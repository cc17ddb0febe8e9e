"""A map as numbers and names, before it is drawn: its cells, and the kinds of content in them.

A *kind* is a small number for the content of a range: a hole, written zeros, a layer, or a group of
layers. Higher kinds lie on top. Nothing is opened or drawn.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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


#: The kinds of a hole in all layers, and of the base's data.
HOLE = 0
BASE = 2

MAX_GROUPS = 12

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Subject:
    """The subject of a map: `[start, stop)` of an image of `size` bytes, in pages of `page` bytes.

    `names` are those of its layers, base first, and `title` is that of the image; both are printed
    as they are. `scanned` means that the data were scanned for written zeros.
    """

    title: str
    names: Sequence[str]
    size: int
    start: int
    stop: int
    page: int
    scanned: bool


class Kinds:
    """The kinds of content of a map of `layers` layers, as numbers.

    0 is a hole in all layers. Each layer has two kinds, its written zeros (odd) and its other data
    (the next number), from 1 and 2 for the base up to those of the newest layer. More than 12
    layers are grouped: the base stays alone, and the diffs form 11 groups of neighbours of equal
    size, or one more in the older ones.
    """

    def __init__(self, layers: int) -> None:
        self.groups = _groups(layers)
        self._of_layer = [BASE + 2 * n for n, group in enumerate(self.groups) for _ in group]
        #: The kinds of data, the base's first.
        self.layers = range(BASE, BASE + 2 * len(self.groups), 2)

    def __len__(self) -> int:
        return 1 + 2 * len(self.groups)

    @property
    def grouped(self) -> bool:
        """Whether any kind represents more than one layer."""
        return len(self.groups) < len(self._of_layer)

    def of(self, layer: int | None, zero: bool) -> int:
        """The kind of bytes that `layer` supplies (None: a hole); `zero`: all are zeros."""
        return HOLE if layer is None else self._of_layer[layer] - zero

    @staticmethod
    def is_zeros(kind: int) -> bool:
        """Whether a kind is the written zeros of a layer."""
        return kind % 2 == 1

    def group(self, kind: int) -> range:
        """The layers that a kind represents; none for holes."""
        return self.groups[(kind - 1) // 2] if kind != HOLE else range(0)

    def label(self, kind: int) -> str:
        """The numbers of a kind's layers, '3' or '4-7'; '-' for holes."""
        if not (group := self.group(kind)):
            return "-"
        return str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"

    def name(self, kind: int, names: Sequence[str]) -> str:
        """The name of a kind; `names` are those of the layers."""
        if not (group := self.group(kind)):
            return "zero by hole"
        if self.is_zeros(kind):
            return "written zeros"
        if len(group) == 1:
            return names[group[0]]
        return f"{names[group[0]]} .. {names[group[-1]]}"

    def present(self, totals: Sequence[int]) -> list[int]:
        """The kinds to draw, given the bytes of each: all but written zeros that do not occur.

        The layers in order, base first, each followed by its written zeros; then the holes.
        """
        pairs = [(kind, kind - 1) for kind in self.layers]
        zeros = {kind for kind in range(1, len(self), 2) if totals[kind]}
        return [k for pair in pairs for k in pair if k in self.layers or k in zeros] + [HOLE]

    def note(self) -> str:
        """A note that layers are grouped; empty if they are not."""
        if not self.grouped:
            return ""
        return (
            f"{len(self._of_layer)} layers are drawn as {len(self.groups)}: the base, and the diffs"
            " in groups of neighbours."
        )


def _groups(layers: int) -> list[range]:
    if layers <= MAX_GROUPS:
        return [range(n, n + 1) for n in range(layers)]
    size, larger = divmod(layers - 1, MAX_GROUPS - 1)
    groups = [range(1)]
    for number in range(MAX_GROUPS - 1):
        start = groups[-1].stop
        groups.append(range(start, start + size + (number < larger)))
    return groups


def short_names(paths: Sequence[str]) -> list[str]:
    """The distinguishing parts of paths: without the directories, file name or suffix of all.

    `/s/base/memory.bin` and `/s/work/memory.bin` are 'base' and 'work', `/s/0-base.mem` and
    `/s/1-work.mem` are '0-base' and '1-work'. One path alone becomes its file name.
    """
    split = [path.split("/") for path in paths]
    if len(set(paths)) == 1:
        return [parts[-1] for parts in split]
    if len({parts[-1] for parts in split}) == 1 and all(any(parts[:-1]) for parts in split):
        split = [parts[:-1] for parts in split]
    common = 0
    while all(len(parts) > common + 1 for parts in split) and (
        len({parts[common] for parts in split}) == 1
    ):
        common += 1
    names = ["/".join(parts[common:]) for parts in split]
    suffixes = {os.path.splitext(name)[1] for name in names}
    return [os.path.splitext(name)[0] for name in names] if len(suffixes) == 1 else names


def shortened(name: str, length: int) -> str:
    """The name, with '..' in its middle if it has more than `length` characters (at least 5)."""
    if len(name) <= length:
        return name
    head = (length - 2) // 2
    return f"{name[:head]}..{name[head + 2 - length :]}"


def percent(part: int, whole: int) -> str:
    """`part` of `whole` in percent; 0.00 only for nothing, and 100.00 only for everything."""
    text = f"{100 * part / whole:.2f}"
    if part and text == "0.00":
        return "<0.01 %"
    return ">99.99 %" if part < whole and text == "100.00" else f"{text} %"


def size_text(nbytes: int) -> str:
    """A number of bytes in the largest binary unit that is not above it; at most two decimals."""
    power = min(max(nbytes.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    number = f"{nbytes / 1024**power:.2f}".rstrip("0").rstrip(".")
    return f"{number} {_UNITS[power]}"


def address(offset: int, stop: int) -> str:
    """The offset in hexadecimal, as wide as all of a range that ends at `stop` need."""
    return f"{offset:#0{2 + max(8, len(f'{stop:x}'))}x}"
