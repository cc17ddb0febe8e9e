"""A figure measured in pixels from its top left corner: text, boxes, lines and an image on it."""

from __future__ import annotations

import base64
import bisect
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import IdentityTransform
from numpy.typing import NDArray
from PIL import Image

from diffmergefs.pictures.maps import shortened

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

    def line(self, points: Sequence[tuple[float, float]], **looks: Any) -> None:
        """Draw a line through the points (x, y); `looks` are options of a matplotlib line."""
        xs, ys = [x for x, _ in points], [self.height - y for _, y in points]
        self.figure.add_artist(Line2D(xs, ys, transform=IdentityTransform(), **looks))

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
