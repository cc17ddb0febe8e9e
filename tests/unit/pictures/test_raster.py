"""The curves: every cell once, and along the Hilbert curve neighbours stay neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from diffmergefs.pictures.raster import Layout, hilbert


def place(order: int, number: int) -> tuple[int, int]:
    """Row and column of a cell by the usual algorithm, digit by digit (base 4) from the last."""
    row = column = 0
    side = 1
    while side < 2**order:
        right = 1 & (number // 2)
        down = 1 & (number ^ right)
        if down == 0:
            if right == 1:
                row, column = side - 1 - row, side - 1 - column
            row, column = column, row
        column += side * right
        row += side * down
        number //= 4
        side *= 2
    return row, column


@pytest.mark.parametrize("order", range(6))
def test_a_cell_is_where_the_usual_algorithm_puts_it(order: int) -> None:
    square = hilbert(order)
    assert sorted(square.flat) == list(range(4**order))
    for number in range(4**order):
        assert square[place(order, number)] == number


def test_neighbours_in_the_range_are_neighbours_in_the_square() -> None:
    square = hilbert(10)
    where = np.empty((4**10, 2), np.int64)
    where[square.ravel()] = np.argwhere(np.ones_like(square))
    assert (np.abs(np.diff(where, axis=0)).sum(axis=1) == 1).all()
    assert (square[0, 0], square[0, -1]) == (0, 4**10 - 1)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_part_of_the_curve_fills_a_square(parts: int) -> None:
    square, side = hilbert(6), 64 // parts
    for row in range(0, 64, side):
        for column in range(0, 64, side):
            part = square[row : row + side, column : column + side] // side**2
            assert (part == part[0, 0]).all()


def test_rows_are_as_many_as_the_cells_need() -> None:
    layout = Layout.linear(2, 7)  # no more than half of 16
    assert layout.numbers.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.zoom == (512, 256)
    assert Layout.linear(2, 9).numbers.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert Layout.linear(0, 1).numbers.tolist() == [[0]]


@pytest.mark.parametrize("cells", [1, 2, 3, 5, 16, 17, 300, 33_000, 600_000, 4**10])
def test_cells_of_rows_are_nearly_square_and_fill_the_height(cells: int) -> None:
    order = next(n for n in range(11) if 4**n >= cells)
    layout = Layout.linear(order, cells)
    wide, high = layout.zoom
    assert max(wide, high) <= 2 * min(wide, high)
    assert layout.columns * wide == 1024 and 512 <= layout.rows * high <= 1024
    assert layout.numbers.size - cells < layout.columns


@pytest.mark.parametrize(("cells", "shape", "parts"), [(32, (8, 4), (4, 2)), (33, (8, 8), (4, 4))])
def test_half_a_curve_fills_the_left_half(
    cells: int, shape: tuple[int, int], parts: tuple[int, int]
) -> None:
    layout = Layout.hilbert(3, cells)
    assert (layout.numbers.shape, layout.parts) == (shape, parts)
    assert sorted(layout.numbers.flat) == list(range(shape[0] * shape[1]))
