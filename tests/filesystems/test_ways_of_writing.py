"""Which pages become data by the way in which a diff is written: what the contract says of it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.layer import Layer
from tests.support.images import PAGE, write_layer

SIZE = 32 << 20
#: Every third page, ascending: readahead for a mapping believes that it knows what comes next.
PAGES = range(0, 3000, 3)


def by_write(path: Path) -> None:
    with path.open("r+b", buffering=0) as file:
        for page in PAGES:
            os.pwrite(file.fileno(), b"x" * PAGE, page * PAGE)


def by_write_after_reading(path: Path) -> None:
    path.read_bytes()
    by_write(path)


def through_a_mapping(path: Path, *advice: int) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as memory:
        for each in advice:
            memory.madvise(each)
        for page in PAGES:
            memory[page * PAGE] = 1


def through_a_mapping_at_random(path: Path) -> None:
    through_a_mapping(path, mmap.MADV_RANDOM)


def through_a_mapping_after_reading(path: Path) -> None:
    path.read_bytes()
    through_a_mapping(path)


def became_data(folder: Path, write: Callable[[Path], None]) -> int:
    path = write_layer(folder / "diff", SIZE, [])
    write(path)
    layer = Layer.open(str(path))
    try:
        return layer.extents.data_bytes // PAGE
    finally:
        layer.close()


@pytest.mark.parametrize("way", [by_write, by_write_after_reading, through_a_mapping_at_random])
def test_the_safe_ways_make_data_of_just_what_they_write(
    way: Callable[[Path], None], real_fs: Path
) -> None:
    assert became_data(real_fs, way) == len(PAGES)


@pytest.mark.parametrize("way", [through_a_mapping, through_a_mapping_after_reading])
def test_on_xfs_stores_through_other_mappings_fill_holes(
    way: Callable[[Path], None], filesystem: Callable[[str], Path]
) -> None:
    """The reason why they are not among the safe ways."""
    assert became_data(filesystem("xfs"), way) > len(PAGES)
