"""The picture of a map."""

from __future__ import annotations

import base64
import io
import itertools
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

from diffmergefs.analysis.info import MapEntry
from diffmergefs.pictures import maps, raster
from diffmergefs.pictures.canvas import Canvas
from diffmergefs.pictures.map_picture import ADDRESSES, LEFT, TOP, MapPicture
from diffmergefs.pictures.maps import BASE, HOLE, Kinds
from tests.support import sample_map
from tests.support.images import PAGE
from tests.support.places import DOCS
from tests.support.subjects.maps import subject, tiled
from tests.unit.pictures.test_raster import place

pytestmark = pytest.mark.slow  # each draws a picture

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"

Pixels = NDArray[np.uint8]


def png_pixels(picture: MapPicture) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(picture.png())).convert("RGB"))


def svg_root(picture: Canvas) -> ET.Element:
    return ET.fromstring(picture.svg())


def embedded(root: ET.Element) -> tuple[int, int, Pixels]:
    """The image in an SVG, and where its top left pixel is."""
    (image,) = root.iter(f"{SVG}image")
    head, _, data = image.attrib[HREF].partition(",")
    assert head == "data:image/png;base64" and "transform" not in image.attrib
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    width, height = int(image.attrib["width"]), int(image.attrib["height"])
    assert pixels.shape == (height, width, 3)  # pixel by pixel
    return int(image.attrib["x"]), int(image.attrib["y"]), pixels


def words(picture: Canvas) -> list[str]:
    return ["".join(text.itertext()) for text in svg_root(picture).iter(f"{SVG}text")]


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def cell(pixels: Pixels, picture: MapPicture, number: int, layout: str = "linear") -> Pixels:
    """The pixels of the cell with this number."""
    is_linear = layout == "linear"
    row, column = (
        divmod(number, picture.layout.columns) if is_linear else place(picture.order, number)
    )
    x, y = picture.pixel(row, column)
    wide, high = picture.layout.zoom
    return pixels[y : y + high, x : x + wide]


def is_plain(pixels: Pixels, colour: tuple[int, ...]) -> bool:
    return bool((pixels == np.array(colour)).all())


def kind_of(content: int | str | None) -> int:
    if isinstance(content, int):
        return data_of(content)
    return HOLE if content is None else zeros_of(2)


def data_of(layer: int) -> int:
    return BASE + 2 * layer


def zeros_of(layer: int) -> int:
    return data_of(layer) - 1


CONTENT: list[int | str | None] = [
    (0, 1, None, 2, 0, "zeros", 0)[(n * n + n // 7) % 7] for n in range(300)
]


@pytest.mark.parametrize("layout", ["hilbert", "linear"])
def test_each_cell_has_the_colour_of_its_address(layout: str) -> None:
    """In both formats, over the whole of the cell: nothing is drawn over it."""
    picture = MapPicture(tiled(CONTENT), subject(300), layout)
    assert picture.order == 5  # 1024 cells: 256 are too few
    wide, high = picture.layout.zoom
    assert (wide, high) == ((64, 53) if layout == "linear" else (32, 32))
    shown = png_pixels(picture)
    x, y, image = embedded(svg_root(picture))
    height, width, _ = image.shape
    placed = np.full_like(shown, 255)
    placed[y : y + height, x : x + width] = image
    colours = raster.colours(picture.kinds)
    for number, content in enumerate(CONTENT):
        kind = kind_of(content)
        for pixels in (shown, placed):
            part = cell(pixels, picture, number, layout)
            assert part.shape == (high, wide, 3) and is_plain(part, rgb(colours[kind])), number
    for number in range(300, picture.layout.numbers.size):
        for pixels in (shown, placed):
            part = cell(pixels, picture, number, layout)
            assert len(np.unique(part.reshape(-1, 3), axis=0)) == 2, "hatched"


@pytest.mark.parametrize(("pages", "order"), [(1, 0), (3, 1), (16, 2), (17, 3)])
@pytest.mark.parametrize("layout", ["hilbert", "linear"])
def test_small_images_have_few_cells(pages: int, order: int, layout: str) -> None:
    picture = MapPicture(tiled([1] * pages), subject(pages), layout)
    shown = png_pixels(picture)
    assert picture.order == order
    newest = rgb(raster.colours(picture.kinds)[data_of(1)])
    for number in range(pages):
        assert is_plain(cell(shown, picture, number, layout), newest)


BIG_PAGES = 3 << 20


@pytest.fixture(scope="module")
def crowded() -> MapPicture:
    """Three pages a cell; what is in the first cells stands here, and the rest is the base."""
    return crowd("hilbert")


def crowd(layout: str) -> MapPicture:
    cells: list[list[int | None]] = [
        [2, 2, 2],
        [2, 0, 0],
        [0, 2, 2],
        [0, 0, 0],
        [None, None, None],
        [0, None, None],
        [1, 2, 1],
        [None, 1, 1],
    ]
    content = [layer for pages in cells for layer in pages]
    rest = MapEntry(len(content) * PAGE, BIG_PAGES * PAGE, 0, False)
    return MapPicture([*tiled(content), rest], subject(BIG_PAGES), layout)


def test_many_pages_a_cell_show_the_newest_layer_and_its_share(crowded: MapPicture) -> None:
    """Neither the majority nor newness alone: the colour says which, its strength how much."""
    assert (crowded.order, crowded.grid.cell) == (10, 3 * PAGE)
    shown = png_pixels(crowded)
    found = [tuple(int(v) for v in cell(shown, crowded, n, "hilbert")[0, 0]) for n in range(9)]
    palette = raster.palette(crowded.kinds)

    def shade(layer: int, strength: int) -> tuple[int, ...]:
        return tuple(int(v) for v in palette[raster.colour_number(data_of(layer), strength)])

    full, weakest = raster.STRENGTHS, 1
    middle = 1 + int(9 * np.log(2) / np.log(3))
    assert found == [
        shade(2, full),
        shade(2, weakest),
        shade(2, middle),
        shade(0, full),
        (255, 255, 255),
        shade(0, weakest),
        shade(2, weakest),
        shade(1, middle),
        shade(0, full),
    ]
    assert full > middle > weakest


def test_the_title_says_how_many_pages_a_cell_has(crowded: MapPicture) -> None:
    assert words(crowded)[0] == "/srv/snapshots/pandas: 3 pages a cell (12 KiB)"
    assert "1024 x 1024 cells, along a Hilbert curve · 12 GiB image, 3 layers" in words(crowded)
    assert "share of the cell, logarithmic" in words(crowded)
    one = words(MapPicture(tiled([0] * 4), subject(4)))
    assert one[0] == "/srv/snapshots/pandas: 1 page a cell (4 KiB)"
    assert "share of the cell, logarithmic" not in one


def test_the_sixteen_parts_bear_their_addresses(crowded: MapPicture) -> None:
    found = {word.split()[0] for word in words(crowded) if word.startswith("0x")}
    part = BIG_PAGES * PAGE // 16
    assert found == {f"{n * part:#011x}" for n in range(16)}
    # Each above its own part of the curve.
    for text in svg_root(crowded).iter(f"{SVG}text"):
        if (word := "".join(text.itertext())).startswith("0x"):
            row, column = place(2, int(word.split()[0], 16) // part)
            x, y = crowded.pixel(row * 256, column * 256)
            assert (float(text.attrib["x"]), float(text.attrib["y"])) == (x, y - 6)


def test_the_arrows_lead_along_the_curve(crowded: MapPicture) -> None:
    found = dict(w.split() for w in words(crowded) if w.startswith("0x") and " " in w.strip())
    part = BIG_PAGES * PAGE // 16
    steps = {(0, 1): "→", (0, -1): "←", (1, 0): "↓", (-1, 0): "↑"}
    for n in range(15):
        here, there = place(2, n), place(2, n + 1)
        arrow = steps[there[0] - here[0], there[1] - here[1]]
        assert found[f"{n * part:#011x}"] == arrow


def test_the_curve_has_a_key_that_shows_its_path(crowded: MapPicture) -> None:
    """Through the centres of 8 x 8 squares, in the order of addresses, from a dot on."""
    lines = [np.array(line.get_xydata()) for line in crowded.figure.findobj(Line2D)]
    path = max(lines, key=len)
    steps = np.diff(path, axis=0)
    (step,) = set(np.abs(steps).sum(axis=1).round(6))
    corner = np.array([path[:, 0].min(), path[:, 1].max()])
    squares = np.rint(np.abs(path - corner) / step).astype(int)
    assert [(int(y), int(x)) for x, y in squares] == [place(3, number) for number in range(64)]
    assert [line.tolist() for line in lines if len(line) == 1] == [path[:1].tolist()]
    assert "this path, from the dot on:" in words(crowded)


def test_half_of_the_curve_is_drawn_for_half_a_square() -> None:
    """The empty half of the square, and of the key, is left out."""
    picture = MapPicture(tiled([0] * 32), subject(32), "hilbert")
    assert (picture.layout.rows, picture.layout.columns) == (8, 4)
    assert picture.layout.size[0] < picture.layout.size[1] / 2 + 50
    path = max((np.array(n.get_xydata()) for n in picture.figure.findobj(Line2D)), key=len)
    assert len(path) == 32
    assert "beyond the end" not in words(picture)


def test_rows_bear_their_addresses_and_are_the_default() -> None:
    picture = MapPicture(tiled([0] * 300), subject(300))
    rows = [f"{row * 16 * PAGE:#010x}" for row in range(0, 19, 2)]
    texts = {"".join(t.itertext()): t for t in svg_root(picture).iter(f"{SVG}text")}
    assert [word for word in texts if word.startswith("0x")] == rows
    for row, word in zip(range(0, 19, 2), rows, strict=True):
        assert float(texts[word].attrib["y"]) == picture.pixel(row, 0)[1] + 11
    assert "16 x 19 cells, row by row · 1.17 MiB image, 3 layers" in texts
    assert "this path, from the dot on:" not in texts


@pytest.mark.parametrize("layout", ["linear", "hilbert"])
@pytest.mark.parametrize("pages", [1, 3, 32, 200, 257, 33_000])
def test_most_of_the_sheet_shows_something(pages: int, layout: str) -> None:
    """The map, or the legend above the end of its text: less than a third is empty."""
    entries = [MapEntry(0, pages * PAGE, 0, False)]
    picture = MapPicture(entries, subject(pages), layout)
    width, height = picture.layout.size
    assert picture.layout.numbers.size < 2 * picture.grid.cells or layout == "hilbert"
    assert width * height > picture.width * picture.height * (0.5 if layout == "linear" else 0.4)


def test_the_legend_has_bytes_and_percent_for_all() -> None:
    found = words(MapPicture(tiled(CONTENT), subject(300)))

    def after(name: str) -> list[str]:
        return found[found.index(name) + 1 :][:2]

    for kind, name in ((0, "layer0"), (1, "layer1"), (2, "layer2"), (None, "zero by hole")):
        count = CONTENT.count(kind)
        assert after(name) == [f"{count * PAGE:,}", f"{count / 3:.2f} %"]
    assert (zeros := CONTENT.count("zeros")) > 9
    assert after("written zeros") == [f"{zeros * PAGE:,}", f"{zeros / 3:.2f} %"]
    assert found[found.index("written zeros") - 1] == "2"  # the layer's number
    assert after("beyond the end") == [f"{4 * PAGE:,}", f"{400 / 304:.2f} %"]
    assert "(share of the map)" in found


def test_written_zeros_have_a_colour_for_each_layer_that_wrote_them() -> None:
    picture = MapPicture(
        [MapEntry(n * PAGE, (n + 1) * PAGE, n % 3, n < 3) for n in range(6)], subject(6)
    )
    shown = png_pixels(picture)
    found = [tuple(int(v) for v in cell(shown, picture, n)[0, 0]) for n in range(6)]
    colours = raster.colours(picture.kinds)
    kinds = [*(zeros_of(n) for n in range(3)), *(data_of(n) for n in range(3))]
    assert found == [rgb(colours[kind]) for kind in kinds] and len(set(found)) == 6
    entries = [word for word in words(picture) if word == "written zeros"]
    assert len(entries) == 3


def test_what_is_not_there_has_no_entry() -> None:
    found = words(MapPicture(tiled([0] * 4), subject(4, scanned=False)))
    assert "written zeros" not in found and "beyond the end" not in found
    assert "zero by hole" in found and "There are no written zeros." not in found
    scanned = words(MapPicture(tiled([0] * 4), subject(4)))
    assert "written zeros" not in scanned and "There are no written zeros." in scanned


def test_a_range_is_called_one() -> None:
    entries = [
        MapEntry(16 * PAGE + 5, 20 * PAGE, 1, False),
        MapEntry(20 * PAGE, 21 * PAGE, None, True),
    ]
    part = subject(300, start=16 * PAGE + 5, stop=21 * PAGE)
    picture = MapPicture(entries, part)
    found = words(picture)
    assert any("range 0x00010005 to 0x00015000" in word for word in found)
    assert "beyond the range" in found or picture.layout.numbers.size == picture.grid.cells
    assert found[found.index("layer1") + 1 :][:2] == [f"{4 * PAGE - 5:,}", "80.00 %"]
    # The first cell holds less than a page of the range, and all of that.
    colours = raster.colours(picture.kinds)
    assert is_plain(cell(png_pixels(picture), picture, 0), rgb(colours[data_of(1)]))
    assert is_plain(cell(png_pixels(picture), picture, 4), (255, 255, 255))


def test_many_layers_are_grouped_and_a_line_says_so() -> None:
    found = words(MapPicture(tiled(range(40)), subject(40, layers=40)))
    assert "4 layers" not in found
    note = "40 layers are drawn as 12: the base, and the diffs in groups of neighbours."
    assert note in " ".join(found)
    assert found[found.index("layer1 .. layer4") + 1] == f"{4 * PAGE:,}"
    assert found[found.index("layer1 .. layer4") - 1] == "1-4"


def test_a_map_adds_little_to_the_pixels_of_an_svg() -> None:
    # Beside the pixels; the canvas keeps those under two megabytes.
    picture = MapPicture(tiled(range(40)), subject(40, layers=40))
    assert len(picture.svg()) < 100_000
    assert len(raster.palette(Kinds(1000))) <= 256


def test_text_is_text_and_names_are_not_read_as_formulas() -> None:
    names = ["$x_1$ & <b>", "ä.mem", "日本"]
    found = words(MapPicture(tiled([0, 1, 2]), subject(3, names=names, title="a $ b $ c")))
    assert found[0].startswith("a $ b $ c: ")
    # What the font has no letters for is escaped, where it would be a box like any other.
    assert {"$x_1$ & <b>", "ä.mem", "\\u65e5\\u672c"} <= set(found)


def test_long_names_do_not_run_into_the_numbers() -> None:
    names = ["W" * 100, "i" * 100, "short"]
    found = words(MapPicture(tiled([0, 1, 2]), subject(3, names=names, title="T" * 300)))
    wide = next(word for word in found if word.startswith("WW"))
    thin = next(word for word in found if word.startswith("ii"))
    assert ".." in wide and ".." in thin and len(wide) < len(thin) < 100
    assert len(found[0]) < 100


def test_the_same_map_is_the_same_file() -> None:
    first, second = (MapPicture(tiled(CONTENT), subject(300)) for _ in range(2))
    assert first.png() == second.png() and first.svg() == second.svg()


def lightness(colour: str) -> float:
    """CIE L*, 0 (black) to 100: what is left of a colour in grey."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts(colour)]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return float(116 * luminance ** (1 / 3) - 16)


def parts(colour: str) -> list[float]:
    return [value / 255 for value in rgb(colour)]


@pytest.mark.parametrize(("layers", "least"), [(2, 60), (5, 6), (12, 3.5)])
def test_colours_are_told_apart_in_grey(layers: int, least: float) -> None:
    """Lighter is older, so that even without a hue the order is seen."""
    kinds = Kinds(layers)
    found = [lightness(colour) for colour in raster.colours(kinds)]
    data, zeros = [found[k] for k in kinds.layers], [found[k - 1] for k in kinds.layers]
    assert data == sorted(data, reverse=True) and zeros == sorted(zeros, reverse=True)
    assert min(a - b for a, b in itertools.pairwise(data)) >= least
    # Holes and the base are the lightest, and so are the base's written zeros.
    assert found[HOLE] - zeros[0] >= 4 and zeros[0] - data[0] >= 6


def seen_by(colour: str, kind: str) -> NDArray[np.float64]:
    """What someone without red or green cones sees (Machado, Oliveira, Fernandes 2009)."""
    matrix = {
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
    }[kind]
    seen: NDArray[np.float64] = np.array(matrix) @ np.array(parts(colour))
    return seen


@pytest.mark.parametrize("kind", ["protanopia", "deuteranopia"])
def test_colours_are_told_apart_with_fewer_cones(kind: str) -> None:
    found = [seen_by(colour, kind) for colour in raster.colours(Kinds(5))]
    pairs = [(a, b) for n, a in enumerate(found) for b in found[:n]]
    assert min(float(np.linalg.norm(a - b)) for a, b in pairs) > 0.08


def test_the_weakest_of_a_layer_is_no_hole() -> None:
    kinds = Kinds(12)
    palette = raster.palette(kinds).astype(int)
    for kind in range(1, len(kinds)):
        weakest = palette[raster.colour_number(kind, 1)]
        assert np.abs(weakest - 255).max() >= 20
        shades = palette[raster.colour_number(kind, 1) :][: raster.STRENGTHS]
        assert len({tuple(colour) for colour in shades}) == raster.STRENGTHS


def test_the_picture_in_the_docs_is_what_is_drawn_today(tmp_path: Path) -> None:
    """Its cells, that is: letters differ a little from one version of the fonts to the next."""
    assert sample_map.draw(tmp_path / "map.png") == 0
    kept = DOCS / "map.png"
    assert kept.stat().st_size < 100_000
    _, grid = maps.square_grid(0, sample_map.PAGES * PAGE, PAGE)
    left, (width, height) = LEFT + ADDRESSES, raster.Layout.linear(7, grid.cells).size
    box = (left, TOP, left + width, TOP + height)
    ours, theirs = (
        np.asarray(Image.open(path).convert("RGB").crop(box))
        for path in (tmp_path / "map.png", kept)
    )
    assert (ours == theirs).all()
