"""The pictures of a map and of extents."""

from __future__ import annotations

import base64
import io
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diffmergefs.analysis.info import MapEntry, run_lengths
from diffmergefs.core import errors
from diffmergefs.core.extents import ExtentList
from diffmergefs.pictures import canvas
from diffmergefs.pictures.canvas import Canvas
from diffmergefs.pictures.maps import BASE, HOLE, ZEROS, Kinds
from diffmergefs.pictures.pictures import LEFT, TOP, ExtentsPicture, MapPicture
from tests.support import sample_map
from tests.support.commands import diffmergefs, mistake
from tests.support.images import PAGE, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.places import DOCS
from tests.support.subjects.maps import subject, tiled
from tests.unit.pictures.test_canvas import place

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


def cell(pixels: Pixels, picture: MapPicture, number: int, layout: str = "hilbert") -> Pixels:
    """The pixels of the cell with this number."""
    side = 2**picture.order
    row, column = divmod(number, side) if layout == "linear" else place(picture.order, number)
    x, y = picture.pixel(row, column)
    zoom = 1024 // side
    return pixels[y : y + zoom, x : x + zoom]


def is_plain(pixels: Pixels, colour: tuple[int, ...]) -> bool:
    return bool((pixels == np.array(colour)).all())


def kind_of(content: int | str | None) -> int:
    if isinstance(content, int):
        return BASE + content
    return HOLE if content is None else ZEROS


CONTENT: list[int | str | None] = [(0, 1, None, 2, 0, "zeros", 0)[n * n % 7] for n in range(300)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hilbert", "linear"])
def test_each_cell_has_the_colour_of_its_address(layout: str) -> None:
    """In both formats, over the whole of the cell: nothing is drawn over it."""
    picture = MapPicture(tiled(CONTENT), subject(300), layout)
    assert picture.order == 5  # 1024 cells: 256 are too few
    shown = png_pixels(picture)
    x, y, image = embedded(svg_root(picture))
    height, width, _ = image.shape
    placed = np.full_like(shown, 255)
    placed[y : y + height, x : x + width] = image
    colours = canvas.colours(picture.kinds)
    for number, content in enumerate(CONTENT):
        kind = kind_of(content)
        for pixels in (shown, placed):
            part = cell(pixels, picture, number, layout)
            assert part.shape == (32, 32, 3) and is_plain(part, rgb(colours[kind])), number
    for number in range(300, 1024):
        for pixels in (shown, placed):
            part = cell(pixels, picture, number, layout)
            assert len(np.unique(part.reshape(-1, 3), axis=0)) == 2, "hatched"


@pytest.mark.parametrize(("pages", "order"), [(1, 0), (3, 1), (16, 2), (17, 3)])
@pytest.mark.parametrize("layout", ["hilbert", "linear"])
def test_small_images_have_few_cells(pages: int, order: int, layout: str) -> None:
    picture = MapPicture(tiled([1] * pages), subject(pages), layout)
    shown = png_pixels(picture)
    assert picture.order == order
    newest = rgb(canvas.colours(picture.kinds)[BASE + 1])
    for number in range(pages):
        assert is_plain(cell(shown, picture, number, layout), newest)


BIG_PAGES = 3 << 20


@pytest.fixture(scope="module")
def crowded() -> MapPicture:
    """Three pages a cell; what is in the first cells stands here, and the rest is the base."""
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
    return MapPicture([*tiled(content), rest], subject(BIG_PAGES))


def test_many_pages_a_cell_show_the_newest_layer_and_its_share(crowded: MapPicture) -> None:
    """Neither the majority nor newness alone: the colour says which, its strength how much."""
    assert (crowded.order, crowded.grid.cell) == (10, 3 * PAGE)
    shown = png_pixels(crowded)
    found = [tuple(int(v) for v in cell(shown, crowded, n)[0, 0]) for n in range(9)]
    palette = canvas.palette(crowded.kinds)

    def shade(layer: int, strength: int) -> tuple[int, ...]:
        return tuple(int(v) for v in palette[canvas.colour_number(BASE + layer, strength)])

    full, weakest = canvas.STRENGTHS, 1
    middle = 1 + int(15 * np.log(2) / np.log(3))
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
    assert "1024 x 1024 cells, Hilbert curve · 12 GiB image, 3 layers" in words(crowded)
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


def test_rows_bear_their_addresses_in_the_other_layout() -> None:
    found = words(MapPicture(tiled([0] * 300), subject(300), "linear"))
    rows = [f"{row * 32 * PAGE:#010x}" for row in range(0, 10, 2)]
    assert [word for word in found if word.startswith("0x")] == rows
    assert any("row by row" in word for word in found)


def test_the_legend_has_bytes_and_percent_for_all() -> None:
    found = words(MapPicture(tiled(CONTENT), subject(300)))

    def after(name: str) -> list[str]:
        return found[found.index(name) + 1 :][:2]

    for kind, name in ((0, "layer0"), (1, "layer1"), (2, "layer2"), (None, "zero by hole")):
        count = CONTENT.count(kind)
        assert after(name) == [f"{count * PAGE:,}", f"{count / 3:.2f} %"]
    zeros = CONTENT.count("zeros")
    assert after("written zeros") == [f"{zeros * PAGE:,}", f"{zeros / 3:.2f} %"]
    assert after("beyond the end") == [f"{724 * PAGE:,}", f"{72400 / 1024:.2f} %"]
    assert "(share of the square)" in found


def test_what_is_not_there_has_no_entry() -> None:
    found = words(MapPicture(tiled([0] * 4), subject(4, scanned=False)))
    assert "written zeros" not in found and "beyond the end" not in found
    assert "zero by hole" in found


@pytest.mark.slow
def test_a_range_is_called_one() -> None:
    entries = [
        MapEntry(16 * PAGE + 5, 20 * PAGE, 1, False),
        MapEntry(20 * PAGE, 21 * PAGE, None, True),
    ]
    part = subject(300, start=16 * PAGE + 5, stop=21 * PAGE)
    picture = MapPicture(entries, part)
    found = words(picture)
    assert any("range 0x00010005 to 0x00015000" in word for word in found)
    assert "beyond the range" in found
    assert found[found.index("layer1") + 1 :][:2] == [f"{4 * PAGE - 5:,}", "80.00 %"]
    # The first cell holds less than a page of the range, and all of that.
    colours = canvas.colours(picture.kinds)
    assert is_plain(cell(png_pixels(picture), picture, 0), rgb(colours[BASE + 1]))
    assert is_plain(cell(png_pixels(picture), picture, 4), (255, 255, 255))


def test_many_layers_are_grouped_and_a_line_says_so() -> None:
    found = words(MapPicture(tiled(range(40)), subject(40, layers=40)))
    assert "4 layers" not in found
    note = "40 layers are drawn as 12: the base, and the diffs in groups of neighbours."
    assert note in " ".join(found)
    assert found[found.index("layer1 .. layer4") + 1] == f"{4 * PAGE:,}"
    assert found[found.index("layer1 .. layer4") - 1] == "1-4"


@pytest.mark.slow
def test_a_map_adds_little_to_the_pixels_of_an_svg() -> None:
    # Beside the pixels; the canvas keeps those under two.
    picture = MapPicture(tiled(range(40)), subject(40, layers=40))
    assert len(picture.svg()) < 100_000
    assert len(canvas.palette(Kinds(1000))) <= 256


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


@pytest.mark.slow
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
    found = [lightness(colour) for colour in canvas.colours(Kinds(layers))]
    assert found == sorted(found, reverse=True)
    steps = [a - b for a, b in zip(found[BASE:], found[BASE + 1 :], strict=False)]
    assert min(steps) >= least
    # Holes, written zeros and the base, which are the lightest.
    assert found[HOLE] - found[ZEROS] >= 4 and found[ZEROS] - found[BASE] >= 6


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
    found = [seen_by(colour, kind) for colour in canvas.colours(Kinds(5))]
    pairs = [(a, b) for n, a in enumerate(found) for b in found[:n]]
    assert min(float(np.linalg.norm(a - b)) for a, b in pairs) > 0.08


def test_the_weakest_of_a_layer_is_no_hole() -> None:
    kinds = Kinds(12)
    palette = canvas.palette(kinds).astype(int)
    for kind in [ZEROS, *kinds.layers]:
        weakest = palette[canvas.colour_number(kind, 1)]
        assert np.abs(weakest - 255).max() >= 20
    assert len({tuple(colour) for colour in palette[4:]}) == len(palette) - 4


def test_lengths_are_counted_by_powers_of_two() -> None:
    lengths = [1, 1, 2, 3, 4, 7, 8, 1000]
    starts = [4096 * n for n in range(len(lengths))]
    pages = [(s * PAGE, (s + n) * PAGE) for s, n in zip(starts, lengths, strict=True)]
    assert run_lengths(ExtentList(pages), PAGE) == [2, 2, 2, 1, 0, 0, 0, 0, 0, 1]
    assert run_lengths(ExtentList(), PAGE) == []
    assert run_lengths(ExtentList([(0, 512), (1024, 2048)]), PAGE) == [2]
    assert run_lengths(ExtentList([(0, 3 * PAGE - 1)]), PAGE) == [0, 1]


def histogram(layers: int = 3) -> ExtentsPicture:
    lengths = [[0, 0, 0, 1], [1300, 20], *([n + 1] for n in range(layers - 2))]
    return ExtentsPicture("an image", [f"layer{n}" for n in range(layers)], lengths, PAGE)


def test_a_histogram_has_each_layer_s_extents_and_how_many_are_how_long() -> None:
    found = words(histogram())
    assert found[0] == "an image: data extents"
    rows = found[found.index("0") :]
    assert rows[: 3 + 4 + 5] == [
        *("0", "layer0", "1", "1"),
        *("1", "layer1", "1,320", "1,300", "20"),
        *("2", "layer2", "1"),
    ]
    assert {"4 KiB", "8 KiB", "16 KiB", "32 KiB"} <= set(found)
    assert "64 KiB" not in found


def test_a_bar_is_there_for_a_single_extent() -> None:
    """Beside one of 1,300: in the layer's colour, and shorter."""
    pixels = np.asarray(Image.open(io.BytesIO(histogram().png())).convert("RGB")).astype(int)
    areas = []
    for kind in range(BASE, BASE + 3):
        colour = bytes.fromhex(canvas.colours(Kinds(3))[kind][1:])
        areas.append(int((pixels == np.array(list(colour))).all(axis=2).sum()))
    assert areas[1] > 4 * areas[0] and min(areas) > 500


def test_the_histogram_groups_many_layers_too() -> None:
    found = words(histogram(30))
    assert any("30 layers are drawn as 12" in word for word in found)
    # The second group: layers 4 to 6, with 3, 4 and 5 extents.
    assert found[found.index("4-6") + 1 :][:2] == ["layer4 .. layer6", "12"]


def test_layers_without_extents_have_no_bars() -> None:
    picture = ExtentsPicture("empty", ["base", "diff"], [[], []], PAGE)
    assert words(picture).count("0") == 3  # the base's number, and two counts
    assert picture.png().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["png", "svg"])
def test_info_draws_it(tmp_path: Path, form: str) -> None:
    base = write_layer(tmp_path / "base", 64 * PAGE, [(0, signed(0, 0, 16 * PAGE))])
    pages = [(n * PAGE, signed(1, n * PAGE, PAGE)) for n in range(0, 64, 2)]
    diff = write_layer(tmp_path / "diff", 64 * PAGE, pages)
    output = tmp_path / f"extents.{form}"
    arguments: list[str | Path] = ["info", "--base", base, "--diff", diff]
    with unchanged([base, diff]):
        done = diffmergefs(*arguments, "--plot", output)
    assert (done.returncode, done.stderr) == (0, f"diffmergefs: {output}: written\n")
    if form == "png":
        assert output.read_bytes().startswith(b"\x89PNG")
        return
    assert done.stdout == diffmergefs(*arguments).stdout
    text = output.read_text()
    assert ">32<" in text and ">64 KiB<" in text
    line = mistake(errors.OutputRefusedError.exit_code, *arguments, "--plot", output)
    assert "--force" in line
    assert diffmergefs(*arguments, "--plot", output, "--force").returncode == 0


@pytest.mark.parametrize("arguments", [["--force"], ["--plot", "a.gif"]])
def test_a_wrong_use_of_plot_ends_with_2(tmp_path: Path, arguments: list[str]) -> None:
    base = write_layer(tmp_path / "base", 4 * PAGE, [])
    done = diffmergefs("info", "--base", base, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.slow
def test_the_picture_in_readme_is_what_is_drawn_today(tmp_path: Path) -> None:
    """Its cells, that is: letters differ a little from one version of the fonts to the next."""
    assert sample_map.draw(tmp_path / "map.png") == 0
    kept = DOCS / "map.png"
    assert kept.stat().st_size < 100_000
    width, height = canvas.Placing(7, parted=True).size
    box = (LEFT, TOP, LEFT + width, TOP + height)
    ours, theirs = (
        np.asarray(Image.open(path).convert("RGB").crop(box))
        for path in (tmp_path / "map.png", kept)
    )
    cells = np.ones(ours.shape[:2], bool)
    for row in range(4):  # the addresses above the parts
        cells[row * (256 + canvas.GAP + canvas.STRIP) :][: canvas.STRIP] = False
    assert (ours == theirs)[cells].all()
