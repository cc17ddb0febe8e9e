"""The cells of a map as an image: the colour of each, its place in a layout, and its pixels."""

from __future__ import annotations

from array import array

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from numpy.typing import NDArray

from diffmergefs.pictures import maps
from diffmergefs.pictures.maps import BASE, HOLE, Kinds

SIDE = 1024
GAP = 12
STRIP = 22
#: So many that the palette of a map with 12 layers and their zeros has at most 256 colours.
STRENGTHS = 10

_PAPER = "#ffffff"
_BASE = "#d3d7de"
_GREENS = LinearSegmentedColormap.from_list("greens", ["#d5f5dc", "#74d69a", "#064d2b"])
_LINES = "#9a9a9a"
_HATCH_PERIOD = 8

# Numbers of the palette; from _KINDS on there are STRENGTHS colours for each kind but holes.
_GUTTER, _HOLE, _BEYOND, _HATCH, _KINDS = range(5)


def colours(kinds: Kinds) -> list[str]:
    """The colour of each kind at full strength: the newer a layer, the darker.

    So lightness orders layers by age, also in greyscale and for colour-blind users. Written zeros
    are green, and as dark as their layer is new. Holes are white.
    """
    diffs = len(kinds.layers) - 1
    ages = [0.70 * (diffs - 1 - n) / max(diffs - 1, 1) for n in range(diffs)]
    data, zeros = (matplotlib.colormaps["plasma"], _GREENS)
    found = [_PAPER, to_hex(zeros(0.0)), _BASE]
    for age in ages:
        found += [to_hex(zeros(1 - age)), to_hex(data.resampled(256)(0.02 + age))]
    return found


def palette(kinds: Kinds) -> NDArray[np.uint8]:
    """The colours of a map as rows of red, green and blue; `cell_colours` are indices of it."""
    full = [np.array(to_rgb(colour)) for colour in colours(kinds)]
    found = [np.array(to_rgb(colour)) for colour in (_PAPER, _PAPER, _PAPER, _LINES)]
    for kind in range(1, len(kinds)):
        # A weak diff is still darker than the base, and a weak base darker than a hole.
        below = HOLE if kind <= BASE else BASE - kinds.is_zeros(kind)
        weakest = (full[kind] + full[below]) / 2
        found += list(np.linspace(weakest, full[kind], STRENGTHS))
    return np.array(np.rint(np.array(found) * 255), np.uint8)


def colour_number(kind: int, strength: int) -> int:
    """The index in the palette of a kind other than holes, of strength 1 to STRENGTHS."""
    return _KINDS + (kind - 1) * STRENGTHS + strength - 1


def cell_colours(found: maps.Tops, grid: maps.Grid, page: int) -> NDArray[np.uint8]:
    """For each cell the index of its colour: the newest layer's, as strong as its share."""
    kinds = np.frombuffer(found.kinds, np.uint8).astype(np.int64)
    drawn = colour_number(0, 0) + kinds * STRENGTHS + _strengths(found.nbytes, grid, page)
    return np.where(kinds == HOLE, _HOLE, drawn).astype(np.uint8)


def _strengths(nbytes: array[int], grid: maps.Grid, page: int) -> NDArray[np.int64]:
    # Few distinct numbers occur, so the scale is computed once for each.
    found, where = np.unique(np.frombuffer(nbytes, np.uint64), return_inverse=True)
    levels = [maps.level(int(n), grid.cell, page, STRENGTHS) for n in found]
    strengths = np.array(levels, np.int64)[where]
    for number in {0, grid.cells - 1}:  # these may be incomplete
        whole = grid.bytes_in(number)
        strengths[number] = maps.level(nbytes[number], whole, page, STRENGTHS)
    return strengths


def hilbert(order: int) -> NDArray[np.int64]:
    """The numbers `0 ... 4**order - 1` in a square, `[row, column]`, along a Hilbert curve.

    It begins at the top left and ends at the top right; consecutive numbers are neighbours. Each of
    the `4**k` parts of the curve fills one of `4**k` equal squares.
    """
    square = np.zeros((1, 1), np.int64)
    for _ in range(order):
        # Down the left half, to the right, and up again. The first quarter is turned over one
        # diagonal and the last over the other, so that each ends beside the beginning of the next.
        quarter = square.size
        last = square[::-1, ::-1].T + 3 * quarter
        square = np.block([[square.T, last], [square + quarter, square + 2 * quarter]])
    return square


class Layout:
    """The places of the cells of a grid: a table of their numbers, and its image.

    Each cell is `zoom` pixels wide and high. With `parts` the table is cut into so many rows and
    columns of equal parts, GAP pixels apart, each with STRIP pixels above it for a label that hides
    no cell.
    """

    def __init__(
        self,
        numbers: NDArray[np.int64],
        zoom: tuple[int, int],
        parts: tuple[int, int] | None = None,
    ) -> None:
        self.numbers = numbers
        self.rows, self.columns = numbers.shape
        self.zoom = zoom
        self.parts = parts or (1, 1)
        self._strip = STRIP if parts else 0

    @classmethod
    def linear(cls, order: int, cells: int) -> Layout:
        """Row by row, for a grid of this `order`. The table has no row without a cell.

        It has a power of two of columns, and its cells are at most twice as wide as high, or the
        other way round.
        """
        columns = _columns(order, cells)
        rows = -(-cells // columns)
        numbers = np.arange(rows * columns, dtype=np.int64).reshape(rows, columns)
        return cls(numbers, (SIDE // columns, SIDE // rows))

    @classmethod
    def hilbert(cls, order: int, cells: int) -> Layout:
        """Along a Hilbert curve, in 4 x 4 parts (or single cells, if there are fewer).

        Without the right half of the square if the grid ends in the left one.
        """
        side, columns = 2**order, _columns(order, cells)
        parts = min(4, side)
        zoom = SIDE // side
        return cls(hilbert(order)[:, :columns], (zoom, zoom), (parts, parts * columns // side))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels."""
        x, y = self.pixel(self.rows - 1, self.columns - 1)
        return x + self.zoom[0], y + self.zoom[1]

    def pixel(self, row: int, column: int) -> tuple[int, int]:
        """The top left pixel (x, y) of a cell."""
        down, right = row * self.parts[0] // self.rows, column * self.parts[1] // self.columns
        x = column * self.zoom[0] + right * GAP
        return x, self._strip + row * self.zoom[1] + down * (GAP + self._strip)

    def image(self, drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The image, as indices of the palette.

        `drawn` has the colours of the cells of the grid; the others are hatched.
        """
        found = np.full(max(int(np.max(self.numbers)) + 1, len(drawn)), _BEYOND, np.uint8)
        found[: len(drawn)] = drawn
        plain = found[self.numbers].repeat(self.zoom[1], 0).repeat(self.zoom[0], 1)
        y, x = np.indices(plain.shape)
        plain[(plain == _BEYOND) & ((x + y) % _HATCH_PERIOD < 2)] = _HATCH
        width, height = self.size
        image = np.full((height, width), _GUTTER, np.uint8)
        rows, columns = self.rows // self.parts[0], self.columns // self.parts[1]
        high, wide = rows * self.zoom[1], columns * self.zoom[0]
        for down in range(self.parts[0]):
            for right in range(self.parts[1]):
                x0, y0 = self.pixel(down * rows, right * columns)
                part = plain[down * high : (down + 1) * high, right * wide : (right + 1) * wide]
                image[y0 : y0 + high, x0 : x0 + wide] = part
        return image


def _columns(order: int, cells: int) -> int:
    # The first half of a Hilbert curve fills the left half of its square.
    return 1 << (order - 1 if 2 * cells <= 4**order else order)
