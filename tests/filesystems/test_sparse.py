"""What real filesystems say about sparse files, and that it is passed on exactly."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.extents import Extent
from tests.support.descriptors import opened
from tests.support.images import PAGE, signed, write_layer

MIB = 1 << 20
TIB = 1 << 40


def walk(path: Path) -> list[Extent]:
    with opened(path) as fd:
        return [Extent(*found) for found in sparse.data_extents(fd, path.stat().st_size)]


@pytest.mark.parametrize(
    ("size", "written", "expected"),
    [
        (4 * PAGE, [], []),
        (4 * PAGE, [(0, 4)], [(0, 4 * PAGE)]),
        (4 * PAGE, [(0, 1)], [(0, PAGE)]),
        (4 * PAGE, [(3, 1)], [(3 * PAGE, 4 * PAGE)]),
        (8 * PAGE, [(1, 2), (5, 1)], [(PAGE, 3 * PAGE), (5 * PAGE, 6 * PAGE)]),
        (100, [], []),
        (TIB, [(0, 1), (TIB // PAGE - 1, 1)], [(0, PAGE), (TIB - PAGE, TIB)]),
        (TIB, [], []),
    ],
    ids=["all hole", "all data", "trailing hole", "leading hole", "some", "tiny", "TiB", "no data"],
)
def test_extents_are_the_pages_that_were_written(
    real_fs: Path, size: int, written: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    extents = [(first * PAGE, signed(1, first * PAGE, n * PAGE)) for first, n in written]
    assert walk(write_layer(real_fs / "file", size, extents)) == expected


def test_an_extent_ends_with_a_file_whose_size_is_no_multiple_of_a_page(real_fs: Path) -> None:
    size = 2 * PAGE + 100
    path = write_layer(real_fs / "file", size, [(2 * PAGE, signed(0, 2 * PAGE, 100))])
    assert walk(path) == [(2 * PAGE, size)]


def test_pages_of_written_zeros_are_data(real_fs: Path) -> None:
    path = write_layer(real_fs / "file", 8 * PAGE, [(3 * PAGE, bytes(2 * PAGE))])
    assert walk(path) == [(3 * PAGE, 5 * PAGE)]


def test_extents_of_a_dirty_file_are_exact_too(real_fs: Path) -> None:
    path = real_fs / "file"
    with path.open("wb", buffering=0) as file:
        file.truncate(64 * PAGE)
        for page in range(0, 64, 4):
            os.pwrite(file.fileno(), bytes(PAGE), page * PAGE)
        assert walk(path) == [(n * PAGE, (n + 1) * PAGE) for n in range(0, 64, 4)]


def unwritten(fd: int, size: int = 4 * MIB) -> list[tuple[int, int]]:
    """The preallocated ranges, those that lie side by side joined."""
    return list(sparse.walk(fd, size).unwritten)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_preallocated_range_is_found_and_none_is_once_written(
    kind: str, filesystem: Callable[[str], Path]
) -> None:
    path = write_layer(filesystem(kind) / "file", 4 * MIB, [(0, signed(0, 0, PAGE))])
    with opened(path) as fd:
        assert unwritten(fd) == []
        subprocess.run(["fallocate", "-o", f"{MIB}", "-l", f"{MIB}", path], check=True)
        subprocess.run(["fallocate", "-o", f"{3 * MIB}", "-l", f"{PAGE}", path], check=True)
        os.fsync(fd)
        assert unwritten(fd) == [(MIB, 2 * MIB), (3 * MIB, 3 * MIB + PAGE)]
        # A window that ends before them, and ones that cut them.
        assert unwritten(fd, MIB) == []
        assert unwritten(fd, MIB + PAGE) == [(MIB, MIB + PAGE)]
        assert unwritten(fd, 3 * MIB + 1) == [(MIB, 2 * MIB), (3 * MIB, 3 * MIB + 1)]
        with path.open("r+b") as file:
            file.seek(MIB)
            file.write(signed(0, MIB, 3 * MIB))
            file.flush()
            os.fsync(file.fileno())
        assert unwritten(fd) == []


def test_an_unwritten_range_behind_thousands_of_extents_is_found(
    filesystem: Callable[[str], Path],
) -> None:
    # More extents than one FIEMAP call gives.
    pages = [(2 * n * PAGE, b"x") for n in range(2500)]
    path = write_layer(filesystem("ext4") / "file", 40 * MIB, pages)
    subprocess.run(["fallocate", "-o", f"{30 * MIB}", "-l", f"{PAGE}", path], check=True)
    with opened(path) as fd:
        os.fsync(fd)
        assert unwritten(fd, 40 * MIB) == [(30 * MIB, 30 * MIB + PAGE)]


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_unwritten_ranges_among_thousands_of_written_ones(
    kind: str, filesystem: Callable[[str], Path]
) -> None:
    """In the middle of batches, at their borders, side by side with data, and at the end."""
    spread = range(0, 2500, 7)
    path = write_layer(filesystem(kind) / "file", 40 * MIB, [])
    with path.open("r+b", buffering=0) as file:
        for number in spread:
            os.posix_fallocate(file.fileno(), 3 * number * PAGE, 2 * PAGE)
        for number in range(2500):
            os.pwrite(file.fileno(), b"x", 3 * number * PAGE)
        os.fsync(file.fileno())
    with opened(path) as fd:
        assert unwritten(fd, 40 * MIB) == [
            ((3 * number + 1) * PAGE, (3 * number + 2) * PAGE) for number in spread
        ]


def test_where_there_is_no_fiemap_there_is_no_unwritten_range(
    filesystem: Callable[[str], Path],
) -> None:
    path = write_layer(filesystem("tmpfs") / "file", MIB, [])
    subprocess.run(["fallocate", "-l", f"{MIB}", path], check=True)
    with opened(path) as fd:
        assert unwritten(fd, MIB) == []


@pytest.mark.parametrize(
    ("kind", "magic"),
    [
        ("ext4", 0xEF53),
        ("xfs", 0x58465342),
        ("btrfs", 0x9123683E),
        ("tmpfs", sparse.TMPFS_MAGIC),
        ("overlay", sparse.OVERLAYFS_MAGIC),
    ],
)
def test_the_magic_number_of_each_filesystem(
    kind: str, magic: int, filesystem: Callable[[str], Path]
) -> None:
    with opened(write_layer(filesystem(kind) / "file", PAGE, [])) as fd:
        assert sparse.filesystem_magic(fd) == magic


@pytest.mark.parametrize(
    ("kind", "has"),
    [("ext4", True), ("xfs", True), ("btrfs", True), ("overlay", True), ("tmpfs", False)],
)
def test_which_filesystems_have_a_map_of_extents(
    kind: str, has: bool, filesystem: Callable[[str], Path]
) -> None:
    with opened(write_layer(filesystem(kind) / "file", PAGE, [])) as fd:
        assert sparse.has_map(fd) == has
