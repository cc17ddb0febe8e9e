"""A picture of the extents of an image's layers: their numbers and lengths."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from diffmergefs.core.errors import counted
from diffmergefs.pictures import raster
from diffmergefs.pictures.canvas import FAINT, LINE, Canvas, fitting, own_style
from diffmergefs.pictures.maps import Kinds, size_text

_LEFT = 32
_TOP = 104
_NAMES = 320
_COUNTS = 300
_ROW = 84
_BAR = 56
_BIN = 72
_GRID = "#e2e2e2"


class ExtentsPicture(Canvas):
    """Two histograms side by side, with a row per layer (or per group, for more than 12 layers).

    Left is the number of data extents, right how many have which length. `lengths` are the
    `run_lengths` of each layer, base first, for pages of `page` bytes, and `names` the layers'
    names. Bars are logarithmic, with their numbers and with lines at powers of ten; a single extent
    has a visible bar.
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
        self._right = _LEFT + _NAMES + _COUNTS + 60
        self._bottom = _TOP + _ROW * len(self.counts)
        self._most = max(map(sum, self.counts))
        self._most_of_a_length = max(max(counts, default=0) for counts in self.counts)
        width = max(self._right + self._bins * _BIN + _LEFT, 1000)
        super().__init__(width, self._bottom + 100, title)
        self.text(_LEFT, 42, f"{fitting(title, 700, 24)}: data extents", 24, fontweight="bold")
        layers = counted(len(names), "layer")
        self.text(_LEFT, 72, f"{layers}; the scale of all bars is logarithmic", 17, color=FAINT)
        self.text(_LEFT + _NAMES, _TOP - 6, "extents", 15, color=FAINT)
        self.text(self._right, _TOP - 6, "extents by length", 15, color=FAINT)
        colours = raster.colours(self._kinds)
        self._draw_grid()
        for row, kind in enumerate(self._kinds.layers):
            self._draw_row(row, kind, colours[kind], names)
        self._draw_axis()
        for line, text in enumerate(textwrap.wrap(self._kinds.note(), 90)):
            self.text(_LEFT, self._bottom + 70 + 20 * line, text, 14, color=FAINT)

    def _draw_row(self, row: int, kind: int, colour: str, names: Sequence[str]) -> None:
        foot = _TOP + (row + 1) * _ROW
        looks = {"facecolor": colour, "edgecolor": LINE, "linewidth": 1}
        label = self._kinds.label(kind)
        self.text(_LEFT, foot - 20, label, 16)
        indent = 10 * max(len(self._kinds.label(kind)) for kind in self._kinds.layers) + 12
        name = self._kinds.name(kind, names)
        self.text(_LEFT + indent, foot - 20, fitting(name, _NAMES - indent - 20, 16), 16)
        counts = self.counts[self._kinds.layers.index(kind)]
        total = sum(counts)
        width = (_COUNTS - 70) * _share(total, self._most)
        if total:
            self.box(_LEFT + _NAMES, foot - 41, width, 30, **looks)
        self.text(_LEFT + _NAMES + width + 8, foot - 20, f"{total:,}", 15, mono=True)
        for power, count in enumerate(counts):
            if count:
                height = _BAR * _share(count, self._most_of_a_length)
                x = self._right + power * _BIN
                self.box(x + 4, foot - height, _BIN - 8, height, **looks)
                middle = x + _BIN / 2
                self.text(middle, foot - height - 4, f"{count:,}", 12, ha="center")
        self.box(self._right, foot, self._bins * _BIN, 0, edgecolor=LINE, linewidth=1)

    def _draw_grid(self) -> None:
        looks = {"color": _GRID, "linewidth": 1, "zorder": 0}
        for count in _powers_of_ten(self._most):
            x = _LEFT + _NAMES + (_COUNTS - 70) * _share(count, self._most)
            self.line([(x, _TOP + 4), (x, self._bottom)], **looks)
            self.text(x, self._bottom + 20, f"{count:,}", 13, ha="center", color=FAINT)
        right = self._right + self._bins * _BIN
        for foot in range(_TOP + _ROW, self._bottom + 1, _ROW):
            for count in _powers_of_ten(self._most_of_a_length):
                y = foot - _BAR * _share(count, self._most_of_a_length)
                self.line([(self._right, y), (right, y)], **looks)
                if count > 1:
                    self.text(self._right - 6, y + 4, f"{count:,}", 10, ha="right", color=FAINT)

    def _draw_axis(self) -> None:
        for power in range(self._bins):
            x = self._right + (power + 0.5) * _BIN
            label = size_text(self._page << power)
            self.text(x, self._bottom + 20, label, 13, ha="center", color=FAINT)
        label = "each column: from this length up to the next one's"
        self.text(self._right, self._bottom + 42, label, 13, color=FAINT)


def _powers_of_ten(most: int) -> list[int]:
    return [10**power for power in range(len(str(most)))] if most else []


def _share(count: int, most: int) -> float:
    # From just above 0 for one extent to 1 for the most.
    return math.log2(1 + count) / math.log2(1 + most) if count else 0.0
