"""A map for the terminal: rows, columns and the legend, by the width and the locale."""

from __future__ import annotations

import io
import sys

import pytest

from diffmergefs.cli.terminal import TerminalMap
from tests.support.commands import unsized
from tests.support.images import PAGE
from tests.support.subjects.maps import subject, tiled

NAMES = ["base", "one", "two"]
#: A base of 192 pages; 'one' has scattered pages, and 'two' has two blocks.
PAGES: list[int | None] = [0] * 192 + [None] * 64
for number in (0, 5, 6, 7, 100, 255):
    PAGES[number] = 1
for number in (*range(8, 12), *range(128, 136)):
    PAGES[number] = 2


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns and UTF-8."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def show() -> None:
    """Print the map of PAGES."""
    drawn = TerminalMap(tiled(PAGES), subject(256, names=NAMES, title="base", scanned=False))
    drawn.print([f"/in/{name}" for name in NAMES])


def test_a_row_a_layer_and_in_each_column_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    """64 columns of 4 pages: 1 of them is ▁, 3 are ▆, and only all is █."""
    show()
    rows, legend = capsys.readouterr().out.split("\n#", 1)
    assert rows.splitlines() == [
        "base: 1 MiB, 3 layers",
        "0x00000000 to 0x00100000, 4 pages a column (16 KiB)",
        "",
        "               0x00000000      0x00040000      0x00080000      0x000c0000",
        "               │               │               │               │",
        "0 base         ▆▁ " + 22 * "█" + "▆" + 6 * "█" + "  " + 14 * "█",
        "1 one          ▁▆" + 23 * " " + "▁" + 37 * " " + "▁",
        "2 two            █" + 29 * " " + "██",
        "- zero by hole " + 48 * " " + 15 * "█" + "▆",
    ]
    assert [unsized(line).split() for line in legend.splitlines()][:5] == [
        ["LAYER", "BYTES", "SHARE"],
        ["0", "/in/base", str(175 * PAGE), "68.36", "%"],
        ["1", "/in/one", str(6 * PAGE), "2.34", "%"],
        ["2", "/in/two", str(12 * PAGE), "4.69", "%"],
        ["-", "zero", "by", "hole", str(63 * PAGE), "24.61", "%"],
    ]
    assert "▁ a page or less, █ all of a column" in legend.splitlines()[-1]


def test_nothing_is_printed_before_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    TerminalMap(tiled(PAGES), subject(256, names=NAMES))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "", "LC_CTYPE": "", "LANG": "C"},
        {"LC_ALL": "", "LC_CTYPE": "C.UTF-8", "LANG": "C"},  # as Python makes it of LANG=C
    ],
)
def test_without_utf8_it_is_ascii(
    locale: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in locale.items():
        monkeypatch.setenv(name, value)
    show()
    text = capsys.readouterr().out
    assert text.isascii()
    assert "1 one          .*" + 23 * " " + "." + 37 * " " + ".\n" in text
    assert ". a page or less, @ all of a column" in text


def test_an_encoding_that_is_not_utf8_is_ascii_too(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "latin-1", write_through=True))
    show()
    assert written.getvalue().isascii() and b"1 one" in written.getvalue()


@pytest.mark.parametrize("width", [20, 80, 120, 400])
def test_it_is_as_wide_as_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    show()
    title, rows, *_ = capsys.readouterr().out.split("\n\n")
    longest = max(map(len, rows.splitlines()))
    assert longest <= max(width, 24)
    assert width > 300 or longest > width * 3 // 5
    # One page a column is the finest that there is.
    assert ("1 page a column" in title) == (width == 400)


def test_many_layers_are_grouped_and_a_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for count, grouped in ((30, True), (12, False)):
        names = [f"{n}.mem" for n in range(count)]
        TerminalMap(tiled(range(count)), subject(count, names=names)).print(names)
        text = capsys.readouterr().out
        assert ("30 layers are drawn as 12: the base, and the diffs in groups" in text) == grouped
        assert ("--json names the layer of each range" in text) == grouped
        # A row, and a line of the legend.
        assert sum(" 1-3 " in line for line in text.splitlines()) == 2 * grouped
        assert ("  1-3  1.mem .. 3.mem" in text) == grouped
        assert (text.count(f" {3 * PAGE} ("), text.count(f" {2 * PAGE} (")) == (
            (7, 4) if grouped else (0, 0)
        )
