"""Where the cells of a range lie in a square: along a Hilbert curve, or row by row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def hilbert(order: int) -> NDArray[np.int64]:
    """The numbers `0 ... 4**order - 1` in a square, `[row, column]`, along a Hilbert curve.

    It begins at the top left and ends at the top right, and each number stands beside the next. The
    numbers of one of the `4**k` parts of the curve fill one of `4**k` equal squares.
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
