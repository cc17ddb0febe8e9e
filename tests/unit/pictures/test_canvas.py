"""The canvas of pictures: where things stand, in pixels, in both formats."""

from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diffmergefs.pictures.canvas import Canvas, fitting, own_style
from diffmergefs.pictures.raster import Layout

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"
PALETTE = np.array([[255, 0, 0], [0, 128, 0], [0, 0, 255]], np.uint8)
PIXELS = np.array([[0, 1], [2, 0], [1, 1]], np.uint8)


def png_pixels(canvas: Canvas) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(canvas.png())).convert("RGB"))


def texts(canvas: Canvas) -> list[str]:
    root = ET.fromstring(canvas.svg())
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def test_a_png_has_just_its_size_and_a_box_just_its_pixels() -> None:
    canvas = Canvas(40, 30, "a picture")
    canvas.box(10, 5, 8, 4, facecolor="#102030", linewidth=0, antialiased=False)
    found = png_pixels(canvas)
    assert found.shape == (30, 40, 3)
    expected = np.full((30, 40, 3), 255, np.uint8)
    expected[5:9, 10:18] = (0x10, 0x20, 0x30)
    assert (found == expected).all()


def test_an_image_is_painted_pixel_by_pixel_in_both_formats() -> None:
    canvas = Canvas(20, 20, "a picture")
    canvas.paint(3, 4, PIXELS, PALETTE)
    expected = np.full((20, 20, 3), 255, np.uint8)
    expected[4:7, 3:5] = PALETTE[PIXELS]
    assert (png_pixels(canvas) == expected).all()
    (image,) = ET.fromstring(canvas.svg()).iter(f"{SVG}image")
    place = {name: image.attrib[name] for name in ("x", "y", "width", "height")}
    assert place == {"x": "3", "y": "4", "width": "2", "height": "3"}
    head, _, data = image.attrib[HREF].partition(",")
    assert head == "data:image/png;base64"
    embedded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert embedded.mode == "P"  # a byte or less per pixel
    assert (np.asarray(embedded.convert("RGB")) == PALETTE[PIXELS]).all()


@pytest.mark.slow
def test_an_svg_is_under_two_megabytes_whatever_it_shows() -> None:
    """Noise of 256 colours, the worst that there can be for a compressor."""
    width, height = Layout.hilbert(10, 4**10).size
    canvas = Canvas(width, height, "noise")
    noise = np.random.default_rng(1).integers(0, 256, (height, width), dtype=np.uint8)
    canvas.paint(0, 0, noise, np.arange(768, dtype=np.uint8).reshape(256, 3))
    assert 1_000_000 < len(canvas.svg()) < 1_900_000


def test_a_line_goes_through_its_points() -> None:
    canvas = Canvas(30, 20, "a picture")
    canvas.line([(5, 5), (25, 5)], color="#102030", linewidth=2, antialiased=False)
    rows, columns = np.nonzero((png_pixels(canvas) == (0x10, 0x20, 0x30)).all(axis=2))
    assert set(rows.tolist()) == {4, 5}
    assert 4 <= columns.min() <= 5 and 24 <= columns.max() <= 25


def test_text_stays_text_where_it_was_put() -> None:
    canvas = Canvas(200, 100, "a picture")
    canvas.text(10, 40, "$x_1$ & <b>")
    canvas.text(190, 80, "right", ha="right", mono=True)
    # What the font has no letters for is escaped, where it would be a box like any other.
    canvas.text(10, 60, "日ä")
    assert texts(canvas) == ["$x_1$ & <b>", "right", "\\u65e5ä"]
    left, right, _ = ET.fromstring(canvas.svg()).iter(f"{SVG}text")
    assert (float(left.attrib["x"]), float(left.attrib["y"])) == (10, 40)
    assert (float(right.attrib["x"]), float(right.attrib["y"])) == (190, 80)
    assert "text-anchor: end" in right.attrib["style"] and "monospace" in right.attrib["style"]


def test_both_formats_bear_the_title() -> None:
    canvas = Canvas(10, 10, "a $title$ 日")
    assert Image.open(io.BytesIO(canvas.png())).info["Title"] == "a $title$ \\u65e5"
    assert b"a $title$ \\u65e5" in canvas.svg()


def test_what_a_user_configured_changes_nothing() -> None:
    def drawn() -> tuple[bytes, bytes]:
        with own_style():
            canvas = Canvas(100, 30, "a picture")
            canvas.text(5, 20, "some text")
        return canvas.png(), canvas.svg()

    plain = drawn()
    assert drawn() == plain
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 40, "savefig.dpi": 300}):
        assert drawn() == plain
        assert matplotlib.rcParams["font.size"] == 40


@pytest.mark.parametrize("letter", ["W", "i"])
def test_a_text_that_is_too_wide_loses_its_middle(letter: str) -> None:
    long = "begin" + letter * 100 + "end"
    short = fitting(long, 200, 15)
    assert fitting("begin", 200, 15) == "begin"
    assert short.startswith("begin"[:2]) and short.endswith("end") and ".." in short
    canvas = Canvas(400, 40, "a picture")
    canvas.text(0, 30, short)
    columns = np.flatnonzero((png_pixels(canvas) < 128).any(axis=(0, 2)))
    assert 150 < np.max(columns) <= 200
    assert len(fitting(long, 1, 15)) == 5
