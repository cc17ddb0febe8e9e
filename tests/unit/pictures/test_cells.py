"""Cells: every byte is counted once, where it is, and nothing that is there is drawn as nothing."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.pictures.cells import Grid, bytes_by_kind, level, row_grid, runs, square_grid, tops

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
