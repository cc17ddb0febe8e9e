"""Drawing in pixels: text, boxes and one image, whose pixels are the cells of a map."""

from __future__ import annotations

import base64
import bisect
import io
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.transforms import IdentityTransform
from numpy.typing import NDArray
from PIL import Image

from diffmergefs.pictures import maps
from diffmergefs.pictures.maps import BASE, HOLE, ZEROS, Kinds, shortened

# Matplotlib's unit is 1/72 inch: then points are pixels, in both formats.
_DPI = 72
_IMAGE = re.compile(r"<image [^>]*/>")

INK = "#1a1a1a"
FAINT = "#5c5c5c"
LINE = "#9a9a9a"

_SANS = "sans-serif"
_MONO = "monospace"


@contextmanager
def own_style() -> Iterator[None]:
    """Use matplotlib's defaults inside, not the configuration of its user.

    Text in an SVG stays text, so you can search and select it, and screen readers can read it. Each
    text has its own anchor, so another font moves nothing. Equal pictures are equal files.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "diffmergefs"})
        yield


class Canvas:
    """A white figure of `width` x `height` pixels; positions are from the top left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        self._title = _in_font(title, _SANS)
        self._raster = ""

    def text(
        self,
        x: float,
        y: float,
        content: str,
        size: float = 15,
        *,
        mono: bool = False,
        **looks: Any,
    ) -> None:
        """Write `content` with its baseline at `y`, from `x` on; with `ha="right"` up to `x`."""
        family = _MONO if mono else _SANS
        self.figure.text(
            x,
            self.height - y,
            _in_font(content, family),
            transform=IdentityTransform(),
            family=family,
            fontsize=size,
            parse_math=False,
            **{"color": INK, "va": "baseline", **looks},
        )

    def box(self, x: float, y: float, width: float, height: float, **looks: Any) -> None:
        """Draw a rectangle; `looks` are options of a matplotlib patch."""
        corner = (x, self.height - y - height)
        patch = Rectangle(corner, width, height, transform=IdentityTransform(), **looks)
        self.figure.add_artist(patch)

    def paint(self, x: int, y: int, pixels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> None:
        """Place the one image, pixel by pixel: `pixels` are indices of `palette`.

        The palette has at most 256 rows of red, green and blue.
        """
        assert not self._raster
        height, width = pixels.shape
        self.figure.figimage(palette[pixels], x, self.height - y - height, origin="upper")
        png = base64.b64encode(_indexed_png(pixels, palette)).decode()
        self._raster = (
            f'<image x="{x}" y="{y}" width="{width}" height="{height}"'
            f' style="image-rendering:pixelated" xlink:href="data:image/png;base64,{png}"/>'
        )

    def png(self) -> bytes:
        """The picture as a PNG file."""
        return self._saved("png", {"Title": self._title})

    def svg(self) -> bytes:
        """The picture as an SVG file under 2 MB: text as text, and the image as one lossless PNG.

        That PNG has at most one byte per pixel before compression, whatever the image is.
        """
        text = self._saved("svg", {"Title": self._title, "Date": None}).decode()
        if self._raster:
            # Matplotlib's own image is upside down, and has 4 bytes per pixel before compression.
            text, count = _IMAGE.subn(lambda _: self._raster, text)
            assert count == 1
        return text.encode()

    @own_style()
    def _saved(self, kind: str, metadata: dict[str, str | None]) -> bytes:
        stream = io.BytesIO()
        self.figure.savefig(stream, format=kind, dpi=_DPI, metadata=metadata)
        return stream.getvalue()


def _indexed_png(pixels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    image.putpalette(palette.tobytes())
    image.save(stream, format="png", optimize=True)
    return stream.getvalue()


def fitting(text: str, width: float, size: float) -> str:
    """The text in the sans-serif font, with '..' in the middle if it is wider than `width`."""
    font = get_font(findfont(FontProperties(family=[_SANS])))
    font.set_size(size, _DPI)

    def fits(length: int) -> bool:
        font.set_text(shortened(text, length))
        return bool(font.get_width_height()[0] / 64 <= width)

    length = bisect.bisect(range(5, len(text) + 1), False, key=lambda n: not fits(n))
    return shortened(text, max(length + 4, 5))


def _in_font(text: str, family: str) -> str:
    # Characters that the font lacks would be drawn as identical boxes.
    known = get_font(findfont(FontProperties(family=[family]))).get_charmap()
    return "".join(
        c if ord(c) in known else c.encode("ascii", "backslashreplace").decode() for c in text
    )


SIDE = 1024
GAP = 12
STRIP = 22
STRENGTHS = 16

_PAPER = "#ffffff"
_LINES = "#9a9a9a"
_HATCH_PERIOD = 8

# Numbers of the palette; from _KINDS on there are STRENGTHS colours for each kind but holes.
_GUTTER, _HOLE, _BEYOND, _HATCH, _KINDS = range(5)


def colours(kinds: Kinds) -> list[str]:
    """The colour of each kind at full strength: the newer a layer, the darker.

    So lightness orders layers by age, also in greyscale and for colour-blind users. Written zeros
    are lighter than the base, and holes are white.
    """
    diffs = len(kinds.layers) - 1
    scale = matplotlib.colormaps["plasma"].resampled(256)
    steps = [0.02 + 0.70 * (diffs - 1 - n) / max(diffs - 1, 1) for n in range(diffs)]
    return [_PAPER, "#cdf3f1", "#d3d7de", *(to_hex(scale(step)) for step in steps)]


def palette(kinds: Kinds) -> NDArray[np.uint8]:
    """The colours of a map as rows of red, green and blue; `cell_colours` are indices of it."""
    full = [np.array(to_rgb(colour)) for colour in colours(kinds)]
    found = [np.array(to_rgb(colour)) for colour in (_PAPER, _PAPER, _PAPER, _LINES)]
    for kind in range(ZEROS, len(kinds)):
        # A weak diff is still darker than the base, and a weak base darker than a hole.
        weakest = (full[kind] + full[BASE if kind > BASE else HOLE]) / 2
        found += list(np.linspace(weakest, full[kind], STRENGTHS))
    return np.array(np.rint(np.array(found) * 255), np.uint8)


def colour_number(kind: int, strength: int) -> int:
    """The index in the palette of a kind other than holes, of strength 1 to STRENGTHS."""
    return _KINDS + (kind - ZEROS) * STRENGTHS + strength - 1


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


def linear(order: int) -> NDArray[np.int64]:
    """The numbers `0 ... 4**order - 1` in a square, `[row, column]`, row by row."""
    side = 2**order
    return np.arange(side * side, dtype=np.int64).reshape(side, side)


class Placing:
    """The places of a square's cells, `2**order` a side, in an image of SIDE pixels a side.

    With `parted` the square is cut into 4 x 4 parts (or single cells, if there are fewer), GAP
    pixels apart, each with STRIP pixels above it for a label that hides no cell.
    """

    def __init__(self, order: int, *, parted: bool) -> None:
        self.side = 2**order
        self.zoom = SIDE // self.side
        self.parts = min(4, self.side) if parted else 1
        self._strip = STRIP if parted else 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels."""
        x, y = self.pixel(self.side - 1, self.side - 1)
        return x + self.zoom, y + self.zoom

    def pixel(self, row: int, column: int) -> tuple[int, int]:
        """The top left pixel (x, y) of a cell, `zoom` pixels a side."""
        before = column * self.parts // self.side, row * self.parts // self.side
        x = column * self.zoom + before[0] * GAP
        return x, self._strip + row * self.zoom + before[1] * (GAP + self._strip)

    def image(self, square: NDArray[np.int64], drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The image, as indices of the palette; `square` has the number of the cell at each place.

        `drawn` has the colours of the cells of the grid; the others are hatched.
        """
        numbers = np.full(square.size, _BEYOND, np.uint8)
        numbers[: len(drawn)] = drawn
        plain = numbers[square].repeat(self.zoom, 0).repeat(self.zoom, 1)
        y, x = np.indices(plain.shape)
        plain[(plain == _BEYOND) & ((x + y) % _HATCH_PERIOD < 2)] = _HATCH
        width, height = self.size
        image = np.full((height, width), _GUTTER, np.uint8)
        part, pixels = self.side // self.parts, SIDE // self.parts
        for row in range(self.parts):
            for column in range(self.parts):
                x0, y0 = self.pixel(row * part, column * part)
                rows = slice(row * pixels, (row + 1) * pixels)
                columns = slice(column * pixels, (column + 1) * pixels)
                image[y0 : y0 + pixels, x0 : x0 + pixels] = plain[rows, columns]
        return image
