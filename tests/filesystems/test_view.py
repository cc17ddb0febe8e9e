"""Reads that do not wait, on each file system."""

from __future__ import annotations

from pathlib import Path

from tests.support.images import PAGE, overlay_oracle
from tests.support.subjects.view import data, open_view


def test_read_nowait_gives_the_same_bytes_once_they_are_cached(real_fs: Path) -> None:
    chain = [[data(0, 0, 4)], [data(1, 1, 1), (2 * PAGE, bytes(PAGE))]]
    view = open_view(real_fs, 4 * PAGE, chain)
    expected = overlay_oracle(4 * PAGE, chain)
    assert view.read(0, 4 * PAGE) == expected
    assert view.read_nowait(0, 4 * PAGE) == bytearray(expected)
