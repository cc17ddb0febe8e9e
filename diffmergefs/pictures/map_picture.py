"""A map of an image as a picture: its cells in a layout, and a legend."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from diffmergefs.analysis.info import MapEntry
from diffmergefs.core.errors import counted
from diffmergefs.pictures import maps, raster
from diffmergefs.pictures.canvas import FAINT, INK, LINE, Canvas, fitting, own_style
from diffmergefs.pictures.maps import HOLE, Kinds, Subject, address, percent, size_text

LEFT = 32
TOP = 92
ADDRESSES = 130
_LEGEND = 500
_ENTRY = 27
_NOTE = 21
_KEY = 176
_KEY_ORDER = 3


class MapPicture(Canvas):
    """The map of one subject.

    Its cells are numbered from the start of the range, row by row (`linear`) or along a Hilbert
    curve; `pixel` has the place of each. A cell has the colour of the newest layer in it, stronger
    for a larger share; written zeros of a layer rank below its other data, and holes last. Cells
    beyond the end are hatched. Nothing is drawn over a cell.
    """

    @own_style()
    def __init__(
        self, entries: Iterable[MapEntry], subject: Subject, layout: str = "linear"
    ) -> None:
        """Consumes the entries of the range, in order; raises what they raise."""
        self.subject = subject
        self._along = layout == "hilbert"
        self.kinds = Kinds(len(subject.names))
        self.order, self.grid = maps.square_grid(subject.start, subject.stop, subject.page)
        make = raster.Layout.hilbert if self._along else raster.Layout.linear
        self.layout = make(self.order, self.grid.cells)
        self._left = LEFT if self._along else LEFT + ADDRESSES
        kinds = ((e.start, e.stop, self.kinds.of(e.layer, e.zero)) for e in entries)
        self.found = maps.tops(kinds, self.grid, len(self.kinds))
        width, height = self.layout.size
        legend = self._left + width + 40
        super().__init__(
            legend + _LEGEND + LEFT, TOP + max(height, self._legend_height()) + 36, subject.title
        )
        self._palette = raster.palette(self.kinds)
        self._write_title()
        drawn = raster.cell_colours(self.found, self.grid, subject.page)
        self.paint(self._left, TOP, self.layout.image(drawn), self._palette)
        if self._along:
            self._write_parts()
        else:
            self._write_rows()
        self._write_legend(legend)

    def pixel(self, row: int, column: int) -> tuple[int, int]:
        """The top left pixel (x, y) of a cell, from the picture's top left."""
        x, y = self.layout.pixel(row, column)
        return self._left + x, TOP + y

    def _write_title(self) -> None:
        subject, pages = self.subject, self.grid.cell // self.subject.page
        cell = f"{counted(pages, 'page')} a cell ({size_text(self.grid.cell)})"
        title = f"{fitting(subject.title, 900, 24)}: {cell}"
        self.text(LEFT, 42, title, 24, fontweight="bold")
        order = "along a Hilbert curve" if self._along else "row by row"
        facts = [
            f"{self.layout.columns} x {self.layout.rows} cells, {order}",
            f"{size_text(subject.size)} image, {counted(len(subject.names), 'layer')}",
        ]
        if (subject.start, subject.stop) != (0, subject.size):
            first, last = (address(at, subject.stop) for at in (subject.start, subject.stop))
            facts.append(f"range {first} to {last}")
        self.text(LEFT, 72, " · ".join(facts), 17, color=FAINT)

    # Addresses

    def _write_rows(self) -> None:
        rows = self.layout.rows
        self._frame(0, 0, rows, self.layout.columns)
        step = 1 << (rows // 17).bit_length()  # a power of two, so that the addresses are round
        for row in range(0, rows, step):
            x, y = self.pixel(row, 0)
            label = self._address(int(self.layout.numbers[row, 0]))
            self.text(x - 10, y + 11, label, 14, mono=True, ha="right")

    def _write_parts(self) -> None:
        side = self.layout.rows // self.layout.parts[0]
        parts = self.layout.numbers[::side, ::side] // side**2
        for (row, column), part in np.ndenumerate(parts):
            self._frame(row * side, column * side, side, side)
            if (number := int(part) * side**2) < self.grid.cells:
                x, y = self.pixel(row * side, column * side)
                goes_on = number + side**2 < self.grid.cells
                label = f"{self._address(number)} {_arrow(parts, row, column) if goes_on else ''}"
                self.text(x, y - 6, label, 14, mono=True)

    def _frame(self, row: int, column: int, rows: int, columns: int) -> None:
        x, y = self.pixel(row, column)
        wide, high = columns * self.layout.zoom[0] + 1, rows * self.layout.zoom[1] + 1
        # Exactly around the cells: matplotlib would move the lines to where they look sharpest.
        looks = {"fill": False, "edgecolor": LINE, "linewidth": 1, "snap": False}
        self.box(x - 0.5, y - 0.5, wide, high, **looks)

    def _address(self, number: int) -> str:
        return address(self.grid.origin + number * self.grid.cell, self.subject.stop)

    # The legend

    def _legend_height(self) -> int:
        # At least what it needs.
        entries, notes = len(self.kinds.present(self.found.totals)) + 1, len(list(self._notes()))
        return 170 + _ENTRY * entries + _NOTE * notes + _KEY * self._along

    def _write_legend(self, x: int) -> None:
        y = TOP + 14
        self.text(x, y, "layer", 15, color=FAINT)
        self.text(x + _LEGEND - 95, y, "bytes", 15, color=FAINT, ha="right")
        self.text(x + _LEGEND, y, "share", 15, color=FAINT, ha="right")
        y += 4
        for kind in self.kinds.present(self.found.totals):
            y += _ENTRY
            self._write_kind(x, y, kind)
        y = self._write_beyond(x, y)
        y = self._write_strengths(x, y + 48)
        for line in self._notes():
            self.text(x, y, line, 14, color=FAINT)
            y += _NOTE
        if self._along:
            self._write_path(x, y)

    def _write_kind(self, x: int, y: int, kind: int) -> None:
        self._swatch(x, y, facecolor=raster.colours(self.kinds)[kind])
        name = self.kinds.name(kind, self.subject.names)
        label = "" if kind == HOLE else self.kinds.label(kind)
        nbytes = self.found.totals[kind]
        whole = self.subject.stop - self.subject.start
        self._write_entry(x, y, label, name, nbytes, percent(nbytes, whole))

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
        room = self.layout.numbers.size
        if not (beyond := room - self.grid.cells):
            return y
        y += _ENTRY
        self._swatch(x, y, facecolor="white", hatch="////")
        end = "end" if self.subject.stop == self.subject.size else "range"
        share = percent(beyond, room)
        self._write_entry(x, y, "", f"beyond the {end}", beyond * self.grid.cell, share)
        self.text(x + 36, y + 20, "(share of the map)", 13, color=FAINT)
        return y + 20

    def _write_strengths(self, x: int, y: int) -> int:
        if self.grid.cell == self.subject.page:
            return y
        self.text(x, y, "share of the cell, logarithmic", 14, color=FAINT)
        newest = raster.colour_number(len(self.kinds) - 1, 1)
        shades = self._palette[newest : newest + raster.STRENGTHS] / 255
        width = 192 / raster.STRENGTHS
        for step, colour in enumerate(shades):
            self.box(x + step * width, y + 10, width, 19, facecolor=tuple(colour), linewidth=0)
        self.text(x, y + 48, "1 page", 13)
        self.text(x + 192, y + 48, "all", 13, ha="right")
        return y + 84

    def _notes(self) -> Iterator[str]:
        if self.grid.cell > self.subject.page:
            yield "A cell has the colour of the newest layer in it."
        if self.subject.scanned and not any(self.found.totals[k - 1] for k in self.kinds.layers):
            yield "There are no written zeros."
        if self.kinds.grouped:
            yield from textwrap.wrap(self.kinds.note(), 60)
        if self._along:
            yield "Each square is a part of the range, from the address above"
            yield "it on. In it and from one to the next, addresses grow along"
            yield "this path, from the dot on:"

    def _write_path(self, x: int, y: int) -> None:
        order = min(self.order, _KEY_ORDER)
        share = -(-self.grid.cells * 4**order // 4**self.order)
        places = np.argsort(raster.hilbert(order), axis=None)[:share]
        step = _KEY / 2**order
        points = [
            (x + (place % 2**order + 0.5) * step, y + (place // 2**order + 0.5) * step)
            for place in places.tolist()
        ]
        self.line(points, color=INK, linewidth=1.5)
        self.line(points[:1], color=INK, marker="o", markersize=7)


def _arrow(parts: NDArray[np.int64], row: int, column: int) -> str:
    # To where the next part of the curve is.
    ((y, x),) = np.argwhere(parts == parts[row, column] + 1)
    return {(0, 1): "→", (0, -1): "←", (1, 0): "↓", (-1, 0): "↑"}[int(y) - row, int(x) - column]
