"""The histograms of `info --plot`."""

from __future__ import annotations

import io
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.lines import Line2D
from PIL import Image

from diffmergefs.analysis.info import run_lengths
from diffmergefs.core import errors
from diffmergefs.core.extents import ExtentList
from diffmergefs.pictures import raster
from diffmergefs.pictures.extents_picture import ExtentsPicture
from diffmergefs.pictures.maps import Kinds
from tests.support.commands import diffmergefs, mistake
from tests.support.images import PAGE, signed, write_layer
from tests.support.inputs import unchanged

SVG = "{http://www.w3.org/2000/svg}"


def words(picture: ExtentsPicture) -> list[str]:
    root = ET.fromstring(picture.svg())
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


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
    for kind in Kinds(3).layers:
        colour = bytes.fromhex(raster.colours(Kinds(3))[kind][1:])
        areas.append(int((pixels == np.array(list(colour))).all(axis=2).sum()))
    assert areas[1] > 4 * areas[0] and min(areas) > 500


def test_a_logarithmic_grid_has_a_line_at_each_power_of_ten() -> None:
    """Each where a bar of that many extents would end."""
    picture = ExtentsPicture("grid", ["a", "b"], [[999], [99]], PAGE)
    found = words(picture)
    assert "2 layers; the scale of all bars is logarithmic" in found
    lines = [np.array(line.get_xydata()) for line in picture.figure.findobj(Line2D)]
    upright = sorted({float(line[0, 0]) for line in lines if line[0, 0] == line[1, 0]})
    labels = found[found.index("extents by length") + 1 :]
    assert labels[:3] == ["1", "10", "100"] and len(upright) == 3
    steps = np.diff(upright)
    assert abs(steps[1] / steps[0] - np.log2(101 / 11) / np.log2(11 / 2)) < 1e-6
    level = [line for line in lines if line[0, 1] == line[1, 1]]
    assert len(level) == 2 * 3  # in each row one for 1, 10 and 100


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
