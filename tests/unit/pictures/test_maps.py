"""The cells of a map, and the kinds of content in them."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.pictures.maps import (
    BASE,
    HOLE,
    MAX_GROUPS,
    Grid,
    Kinds,
    address,
    bytes_by_kind,
    level,
    percent,
    row_grid,
    runs,
    short_names,
    shortened,
    size_text,
    square_grid,
    tops,
)

PAGE = 4096


@pytest.mark.parametrize(
    ("pages", "order", "per_cell"),
    [
        (1, 0, 1),
        (2, 1, 1),
        (4, 1, 1),
        (5, 2, 1),
        (16, 2, 1),
        (17, 3, 1),
        (65536, 8, 1),
        (65537, 9, 1),
        (1 << 20, 10, 1),
        ((1 << 20) + 1, 10, 2),
        (3 << 20, 10, 3),
        (1 << 32, 10, 4096),
    ],
)
def test_the_square_is_the_smallest_with_a_page_a_cell(
    pages: int, order: int, per_cell: int
) -> None:
    found, grid = square_grid(0, pages * PAGE, PAGE)
    assert (found, grid.cell) == (order, per_cell * PAGE)
    assert grid.cells <= 4**order
    # What is no whole page counts as one.
    assert square_grid(0, pages * PAGE - 1, PAGE)[1].cells == grid.cells


def test_a_range_begins_with_its_first_byte_s_page() -> None:
    grid = row_grid(PAGE + 100, 4 * PAGE + 1, PAGE, 2)
    assert grid == Grid(PAGE, PAGE + 100, 4 * PAGE + 1, 2 * PAGE)
    assert grid.cells == 2
    assert [grid.bytes_in(n) for n in range(2)] == [2 * PAGE - 100, PAGE + 1]


@pytest.mark.parametrize(("start", "stop"), [(1, 1), (2, 1), (-1, 1)])
def test_an_empty_range_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="empty or negative"):
        row_grid(start, stop, PAGE, 10)


@given(
    start=st.integers(0, 40),
    length=st.integers(1, 200),
    page=st.sampled_from([1, 4, 16]),
    columns=st.integers(1, 30),
)
def test_a_row_has_as_many_cells_as_fit(start: int, length: int, page: int, columns: int) -> None:
    grid = row_grid(start, start + length, page, columns)
    assert grid.cells <= columns and grid.cell % page == 0
    assert sum(grid.bytes_in(n) for n in range(grid.cells)) == length
    assert all(grid.bytes_in(n) > 0 for n in range(grid.cells))
    fewer = grid.cell - page
    assert not fewer or -(-(start + length - grid.origin) // fewer) > columns


def tiling(borders: list[int], start: int, stop: int, kinds: int) -> list[tuple[int, int, int]]:
    inner = sorted({start, stop, *(b for b in borders if start < b < stop)})
    return [(a, b, random.Random(a).randrange(kinds)) for a, b in itertools.pairwise(inner)]


@settings(deadline=None, max_examples=60)
@given(
    start=st.integers(0, 50),
    length=st.integers(1, 300),
    borders=st.lists(st.integers(0, 350), max_size=40),
    cell=st.integers(1, 8),
)
def test_counts_are_those_of_a_count_byte_by_byte(
    start: int, length: int, borders: list[int], cell: int
) -> None:
    stop = start + length
    grid = Grid(start - start % 4, start, stop, 4 * cell)
    ranges = tiling(borders, start, stop, 5)
    expected = [[0] * grid.cells for _ in range(5)]
    for first, last, kind in ranges:
        for byte in range(first, last):
            expected[kind][(byte - grid.origin) // grid.cell] += 1
    assert [list(row) for row in bytes_by_kind(ranges, grid, 5)] == expected
    found = tops(ranges, grid, 5)
    assert found.totals == [sum(row) for row in expected]
    for number in range(grid.cells):
        top = max(kind for kind in range(5) if expected[kind][number])
        assert (found.kinds[number], found.nbytes[number]) == (top, expected[top][number])
    # Sharper than a sum: what one piece fills is one run.
    assert sum(1 for _ in runs(ranges, grid)) <= 3 * len(ranges)


@given(
    part=st.integers(0, 1 << 40),
    whole=st.integers(1, 1 << 40),
    unit=st.sampled_from([512, PAGE, 1 << 21]),
    levels=st.sampled_from([2, 8, 16]),
)
def test_only_nothing_is_drawn_as_nothing_and_only_all_as_all(
    part: int, whole: int, unit: int, levels: int
) -> None:
    part = min(part, whole)
    found = level(part, whole, unit, levels)
    assert 0 <= found <= levels
    assert (found == 0) == (part == 0)
    assert (found == levels) == (part == whole)
    if 0 < part < whole:
        assert found <= level(part + 1, whole, unit, levels)


def test_the_scale_is_logarithmic() -> None:
    whole = 128 * PAGE
    assert [level(pages * PAGE, whole, PAGE, 8) for pages in (1, 2, 4, 8, 16, 32, 64, 128)] == [
        *range(1, 8),
        8,
    ]
    assert level(1, whole, PAGE, 8) == 1
    assert level(1, 2, PAGE, 8) == 1


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_few_layers_are_kinds_of_their_own(layers: int) -> None:
    kinds = Kinds(layers)
    assert len(kinds) == 1 + 2 * layers and not kinds.grouped and kinds.note() == ""
    assert [kinds.of(n, False) for n in range(layers)] == list(kinds.layers)
    assert [kinds.label(kind) for kind in kinds.layers] == [str(n) for n in range(layers)]


@pytest.mark.parametrize("layers", [13, 14, 23, 24, 100, 1000])
def test_many_layers_are_groups_of_neighbours(layers: int) -> None:
    kinds = Kinds(layers)
    assert kinds.grouped and len(kinds.layers) == MAX_GROUPS == 12
    assert [n for group in kinds.groups for n in group] == list(range(layers))
    sizes = [len(group) for group in kinds.groups]
    assert sizes[0] == 1  # the base
    assert sizes[1:] == sorted(sizes[1:], reverse=True) and sizes[1] - sizes[-1] <= 1
    for layer in range(layers):
        assert layer in kinds.group(kinds.of(layer, False))
    assert str(layers) in kinds.note() and "12" in kinds.note()


def test_kinds_are_told_by_number_and_name() -> None:
    kinds = Kinds(14)
    names = [f"n{n}" for n in range(14)]
    assert kinds.of(None, True) == HOLE and kinds.of(3, True) == kinds.of(3, False) - 1
    assert (kinds.label(HOLE), kinds.name(HOLE, names)) == ("-", "zero by hole")
    zeros = BASE + 1  # of layers 1 and 2
    assert kinds.is_zeros(zeros) and not kinds.is_zeros(BASE) and not kinds.is_zeros(HOLE)
    assert (kinds.label(zeros), kinds.name(zeros, names)) == ("1-2", "written zeros")
    assert (kinds.label(BASE), kinds.name(BASE, names)) == ("0", "n0")
    assert (kinds.label(BASE + 2), kinds.name(BASE + 2, names)) == ("1-2", "n1 .. n2")


def test_written_zeros_follow_their_layer_where_there_are_any() -> None:
    kinds = Kinds(3)
    assert kinds.present([0] * len(kinds)) == [BASE, BASE + 2, BASE + 4, HOLE]
    assert kinds.present([9, 0, 0, 4096, 0, 0, 8]) == [BASE, BASE + 2, BASE + 1, BASE + 4, HOLE]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/s/base/memory.bin", "/s/work/memory.bin"], ["base", "work"]),
        (["/s/0-base.mem", "/s/1-work.mem"], ["0-base", "1-work"]),
        (["mem_file", "mem_diff"], ["mem_file", "mem_diff"]),
        (["vm.mem", "vm.diff"], ["vm.mem", "vm.diff"]),
        (["/s/python/memory.bin"], ["memory.bin"]),
        (["/a/m", "/a/m"], ["m", "m"]),
        (["/m", "/x/m"], ["m", "x/m"]),
        (["a/mem", "b/c/mem"], ["a", "b/c"]),
        (["/a/x/1", "/a/y/2"], ["x/1", "y/2"]),
        (["m", "d/m"], ["m", "d/m"]),
        ([".mem", "a.mem"], [".mem", "a.mem"]),
    ],
)
def test_names_are_what_tells_paths_apart(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names


def test_a_long_name_keeps_its_ends() -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abcd..hijk"
    assert shortened("abcdefghijk", 5) == "a..jk"


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 10, "0.00 %"),
        (1, 10**9, "<0.01 %"),
        (10**9 - 1, 10**9, ">99.99 %"),
        (10, 10, "100.00 %"),
        (1, 3, "33.33 %"),
    ],
)
def test_a_share_is_never_rounded_to_nothing_or_all(part: int, whole: int, text: str) -> None:
    assert percent(part, whole) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (4096, "4 KiB"),
        (100 << 10, "100 KiB"),
        (631 * 4096, "2.46 MiB"),
        (16 << 40, "16 TiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_sizes_are_in_binary_units(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


def test_addresses_of_one_range_are_equally_wide() -> None:
    assert address(0x1000, 1 << 20) == "0x00001000"
    assert address(0x1000, 1 << 36) == "0x0000001000"
    assert address(1 << 36, 1 << 36) == "0x1000000000"
