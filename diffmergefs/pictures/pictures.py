"""The pictures: the map of an image, and the extents of its layers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from diffmergefs.analysis.info import MapEntry
from diffmergefs.core.errors import counted
from diffmergefs.pictures import canvas, maps
from diffmergefs.pictures.canvas import FAINT, LINE, Canvas, fitting, own_style
from diffmergefs.pictures.maps import (
    BASE,
    HOLE,
    ZEROS,
    Kinds,
    Subject,
    address,
    percent,
    size_text,
)

LEFT = 32
TOP = 92
_ADDRESSES = 130
_LEGEND = 540


class MapPicture(Canvas):
    """The map of one subject.

    The square has `2**order` cells a side, numbered from the start of the range along a Hilbert
    curve (`canvas.hilbert`) or row by row; `pixel` has the place of each. A cell has the colour of
    the newest layer in it, stronger for a larger share; written zeros rank above all layers, and
    holes last. Cells beyond the end are hatched. Nothing is drawn over a cell.
    """

    @own_style()
    def __init__(
        self, entries: Iterable[MapEntry], subject: Subject, layout: str = "hilbert"
    ) -> None:
        """Consumes the entries of the range, in order; raises what they raise."""
        self.subject = subject
        self._along = layout == "hilbert"
        self.kinds = Kinds(len(subject.names))
        self.order, self.grid = maps.square_grid(subject.start, subject.stop, subject.page)
        self._placing = canvas.Placing(self.order, parted=self._along)
        self._square = canvas.hilbert(self.order) if self._along else canvas.linear(self.order)
        self._left = LEFT if self._along else LEFT + _ADDRESSES
        kinds = ((e.start, e.stop, self.kinds.of(e.layer, e.zero)) for e in entries)
        self.found = maps.tops(kinds, self.grid, len(self.kinds))
        width, height = self._placing.size
        legend = self._left + width + 40
        super().__init__(legend + _LEGEND + LEFT, TOP + height + 36, subject.title)
        self._write_title()
        drawn = canvas.cell_colours(self.found, self.grid, subject.page)
        self._palette = canvas.palette(self.kinds)
        self.paint(self._left, TOP, self._placing.image(self._square, drawn), self._palette)
        if self._along:
            self._write_parts()
        else:
            self._write_rows()
        self._write_legend(legend)

    def pixel(self, row: int, column: int) -> tuple[int, int]:
        """The top left pixel (x, y) of a cell of the square, from the picture's top left."""
        x, y = self._placing.pixel(row, column)
        return self._left + x, TOP + y

    def _write_title(self) -> None:
        subject, pages = self.subject, self.grid.cell // self.subject.page
        cell = f"{counted(pages, 'page')} a cell ({size_text(self.grid.cell)})"
        title = f"{fitting(subject.title, 900, 24)}: {cell}"
        self.text(LEFT, 42, title, 24, fontweight="bold")
        side = self._placing.side
        facts = [
            f"{side} x {side} cells, {'Hilbert curve' if self._along else 'row by row'}",
            f"{size_text(subject.size)} image, {counted(len(subject.names), 'layer')}",
        ]
        if (subject.start, subject.stop) != (0, subject.size):
            first, last = (address(at, subject.stop) for at in (subject.start, subject.stop))
            facts.append(f"range {first} to {last}")
        self.text(LEFT, 72, " · ".join(facts), 17, color=FAINT)

    # Addresses

    def _write_rows(self) -> None:
        self._frame(0, 0, self._placing.side)
        for row in range(0, self._placing.side, max(1, self._placing.side // 16)):
            if (number := int(self._square[row, 0])) < self.grid.cells:
                x, y = self.pixel(row, 0)
                label = self._address(number)
                self.text(x - 10, y + 11, label, 14, mono=True, ha="right")

    def _write_parts(self) -> None:
        side = self._placing.side // self._placing.parts
        parts = self._square[::side, ::side] // side**2
        for (row, column), part in np.ndenumerate(parts):
            self._frame(row * side, column * side, side)
            if (number := int(part) * side**2) < self.grid.cells:
                x, y = self.pixel(row * side, column * side)
                goes_on = number + side**2 < self.grid.cells
                label = f"{self._address(number)} {_arrow(parts, row, column) if goes_on else ''}"
                self.text(x, y - 6, label, 14, mono=True)

    def _frame(self, row: int, column: int, side: int) -> None:
        x, y = self.pixel(row, column)
        pixels = side * self._placing.zoom + 1
        # Exactly around the cells: matplotlib would move the lines to where they look sharpest.
        looks = {"fill": False, "edgecolor": LINE, "linewidth": 1, "snap": False}
        self.box(x - 0.5, y - 0.5, pixels, pixels, **looks)

    def _address(self, number: int) -> str:
        return address(self.grid.origin + number * self.grid.cell, self.subject.stop)

    # The legend

    def _write_legend(self, x: int) -> None:
        y = TOP + canvas.STRIP + 4
        self.text(x, y, "layer", 15, color=FAINT)
        self.text(x + _LEGEND - 95, y, "bytes", 15, color=FAINT, ha="right")
        self.text(x + _LEGEND, y, "share", 15, color=FAINT, ha="right")
        colours = canvas.colours(self.kinds)
        whole = self.subject.stop - self.subject.start
        for kind in [*self.kinds.layers, *[ZEROS] * self.subject.scanned, HOLE]:
            y += 32
            self._swatch(x, y, facecolor=colours[kind])
            name = self.kinds.name(kind, self.subject.names)
            label = self.kinds.label(kind) if kind in self.kinds.layers else ""
            nbytes = self.found.totals[kind]
            self._write_entry(x, y, label, name, nbytes, percent(nbytes, whole))
        y = self._write_beyond(x, y)
        y = self._write_strengths(x, y + 48)
        for line in self._notes():
            self.text(x, y, line, 14, color=FAINT)
            y += 21

    def _write_entry(self, x: int, y: int, label: str, name: str, nbytes: int, share: str) -> None:
        right, indent = x + _LEGEND, x + 36
        if label:
            indent += max(10 * len(self.kinds.label(kind)) for kind in self.kinds.layers) + 10
            self.text(indent - 10, y, label, 16, ha="right")
        self.text(indent, y, fitting(name, right - 250 - indent, 16), 16)
        self.text(right - 95, y, f"{nbytes:,}", 15, mono=True, ha="right")
        self.text(right, y, share, 15, mono=True, ha="right")

    def _swatch(self, x: int, y: int, **looks: str) -> None:
        self.box(x, y - 15, 24, 19, edgecolor=LINE, linewidth=1, **looks)

    def _write_beyond(self, x: int, y: int) -> int:
        room = self._placing.side**2
        if not (beyond := room - self.grid.cells):
            return y
        y += 32
        self._swatch(x, y, facecolor="white", hatch="////")
        end = "end" if self.subject.stop == self.subject.size else "range"
        share = percent(beyond, room)
        self._write_entry(x, y, "", f"beyond the {end}", beyond * self.grid.cell, share)
        self.text(x + 36, y + 20, "(share of the square)", 13, color=FAINT)
        return y + 20

    def _write_strengths(self, x: int, y: int) -> int:
        if self.grid.cell == self.subject.page:
            return y
        self.text(x, y, "share of the cell, logarithmic", 14, color=FAINT)
        newest = canvas.colour_number(len(self.kinds) - 1, 1)
        shades = self._palette[newest : newest + canvas.STRENGTHS] / 255
        for step, colour in enumerate(shades):
            self.box(x + step * 12, y + 10, 12, 19, facecolor=tuple(colour), linewidth=0)
        self.text(x, y + 48, "1 page", 13)
        self.text(x + canvas.STRENGTHS * 12, y + 48, "all", 13, ha="right")
        return y + 84

    def _notes(self) -> Iterator[str]:
        if self.grid.cell > self.subject.page:
            yield "A cell has the colour of the newest layer in it."
        if self._placing.parts > 1:
            yield "Each square is a part of the range, from the address"
            yield "above it on; the arrow points to the next one."
        if self.kinds.grouped:
            yield from textwrap.wrap(self.kinds.note(), 60)


def _arrow(parts: NDArray[np.int64], row: int, column: int) -> str:
    # To where the next part of the curve is.
    ((y, x),) = np.argwhere(parts == parts[row, column] + 1)
    return {(0, 1): "→", (0, -1): "←", (1, 0): "↓", (-1, 0): "↑"}[int(y) - row, int(x) - column]


_TOP = 104
_NAMES = 320
_COUNTS = 300
_ROW = 84
_BAR = 56
_BIN = 72


class ExtentsPicture(Canvas):
    """Two histograms side by side, with a row per layer (or per group, for more than 12 layers).

    Left is the number of data extents, right how many have which length. `lengths` are the
    `run_lengths` of each layer, base first, for pages of `page` bytes, and `names` the layers'
    names. Bars are logarithmic, with their numbers; a single extent has a visible bar.
    """

    @own_style()
    def __init__(
        self, title: str, names: Sequence[str], lengths: Sequence[Sequence[int]], page: int
    ) -> None:
        self._kinds = Kinds(len(names))
        self._page = page
        self.counts = [
            [sum(column) for column in zip_longest(*lengths[group.start : group.stop], fillvalue=0)]
            for group in self._kinds.groups
        ]
        self._bins = max(1, *map(len, self.counts))
        self._right = LEFT + _NAMES + _COUNTS + 60
        self._bottom = _TOP + _ROW * len(self.counts)
        width = max(self._right + self._bins * _BIN + LEFT, 1000)
        super().__init__(width, self._bottom + 100, title)
        self.text(LEFT, 42, f"{fitting(title, 700, 24)}: data extents", 24, fontweight="bold")
        layers = counted(len(names), "layer")
        self.text(LEFT, 72, f"{layers}, bars logarithmic", 17, color=FAINT)
        self.text(LEFT + _NAMES, _TOP - 6, "extents", 15, color=FAINT)
        self.text(self._right, _TOP - 6, "extents by length", 15, color=FAINT)
        colours = canvas.colours(self._kinds)
        for row, kind in enumerate(self._kinds.layers):
            self._draw_row(row, kind, colours[kind], names)
        self._draw_axis()
        for line, text in enumerate(textwrap.wrap(self._kinds.note(), 90)):
            self.text(LEFT, self._bottom + 70 + 20 * line, text, 14, color=FAINT)

    def _draw_row(self, row: int, kind: int, colour: str, names: Sequence[str]) -> None:
        foot = _TOP + (row + 1) * _ROW
        looks = {"facecolor": colour, "edgecolor": LINE, "linewidth": 1}
        label = self._kinds.label(kind)
        self.text(LEFT, foot - 20, label, 16)
        indent = 10 * max(len(self._kinds.label(kind)) for kind in self._kinds.layers) + 12
        name = self._kinds.name(kind, names)
        self.text(LEFT + indent, foot - 20, fitting(name, _NAMES - indent - 20, 16), 16)
        counts = self.counts[kind - BASE]
        total = sum(counts)
        width = (_COUNTS - 70) * _share(total, max(map(sum, self.counts)))
        if total:
            self.box(LEFT + _NAMES, foot - 41, width, 30, **looks)
        self.text(LEFT + _NAMES + width + 8, foot - 20, f"{total:,}", 15, mono=True)
        most = max(max(counts, default=0) for counts in self.counts)
        for power, count in enumerate(counts):
            if count:
                height = _BAR * _share(count, most)
                x = self._right + power * _BIN
                self.box(x + 4, foot - height, _BIN - 8, height, **looks)
                middle = x + _BIN / 2
                self.text(middle, foot - height - 4, f"{count:,}", 12, ha="center")
        self.box(self._right, foot, self._bins * _BIN, 0, edgecolor=LINE, linewidth=1)

    def _draw_axis(self) -> None:
        for power in range(self._bins):
            x = self._right + (power + 0.5) * _BIN
            label = size_text(self._page << power)
            self.text(x, self._bottom + 20, label, 13, ha="center", color=FAINT)
        label = "each column: from this length up to the next one's"
        self.text(self._right, self._bottom + 42, label, 13, color=FAINT)


def _share(count: int, most: int) -> float:
    # From just above 0 for one extent to 1 for the most.
    return math.log2(1 + count) / math.log2(1 + most) if count else 0.0
