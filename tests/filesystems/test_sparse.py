"""What real filesystems say about sparse files, and that it is passed on exactly."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.errors import UnsupportedPlatformError
from diffmergefs.core.extents import Extent, ExtentList
from diffmergefs.core.layer import Layer
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


def test_a_walk_stops_at_the_size_it_was_given(tmp_path: Path) -> None:
    path = write_layer(tmp_path / "file", 8 * PAGE, [(PAGE, bytes(PAGE)), (4 * PAGE, bytes(PAGE))])
    with opened(path) as fd:
        assert list(sparse.data_extents(fd, PAGE + 10)) == [(PAGE, PAGE + 10)]
        assert list(sparse.data_extents(fd, 4 * PAGE)) == [(PAGE, 2 * PAGE)]
        assert list(sparse.data_extents(fd, 0)) == []


def test_data_punched_out_in_the_middle_of_a_walk_is_no_extent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_layer(tmp_path / "file", 8 * PAGE, [(PAGE, bytes(PAGE)), (4 * PAGE, bytes(PAGE))])
    lseek = os.lseek

    def punching(fd: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_HOLE and offset == PAGE:
            subprocess.run(["fallocate", "-p", "-o", f"{PAGE}", "-l", f"{PAGE}", path], check=True)
        return lseek(fd, offset, whence)

    monkeypatch.setattr(os, "lseek", punching)
    with opened(path) as fd:
        assert ExtentList(sparse.data_extents(fd, 8 * PAGE)) == ExtentList([(4 * PAGE, 5 * PAGE)])


def test_errors_of_lseek_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr(os, "lseek", fail)
    path = write_layer(tmp_path / "file", PAGE, [])
    with opened(path) as fd, pytest.raises(OSError, match="bad disk"):
        list(sparse.data_extents(fd, PAGE))


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_off_linux_it_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    path = write_layer(tmp_path / "file", PAGE, [])
    monkeypatch.setattr(sys, "platform", platform)
    with opened(path) as fd, pytest.raises(UnsupportedPlatformError, match=f"is {platform}"):
        list(sparse.data_extents(fd, PAGE))
    with pytest.raises(UnsupportedPlatformError, match=f"is {platform}"):
        Layer.open(str(path))


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
    ("answers", "found"),
    [
        # Overlapping ones, and one that was given before, as of a file that changes meanwhile.
        ([[(0, 8, 0x800), (4, 8, 0x800)], [(4, 8, 0x801)]], [(0, 12)]),
        ([[(0, 8, 0)], [(0, 8, 0)]], []),
        ([[(0, 8, 0)], []], []),
        ([[(8, 100, 0x800)]], [(8, 64)]),
    ],
    ids=["overlap", "no progress", "no end", "beyond the end"],
)
def test_odd_answers_of_fiemap(
    answers: list[list[tuple[int, int, int]]],
    found: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rest = iter(answers)

    def answer(fd: int, code: int, request: bytearray) -> None:
        extents = next(rest)
        struct.pack_into("=I", request, 20, len(extents))
        for n, (start, length, flags) in enumerate(extents):
            struct.pack_into("=QQQQQI", request, 32 + 56 * n, start, 0, length, 0, 0, flags)

    monkeypatch.setattr(fcntl, "ioctl", answer)
    monkeypatch.setattr(sparse, "data_extents", lambda fd, size: iter([]))
    assert list(sparse.walk(-1, 64).unwritten) == found
    assert next(rest, None) is None


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


def test_the_magic_number_of_no_file_is_an_oserror() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        sparse.filesystem_magic(-1)


@pytest.mark.parametrize(
    ("kind", "has"),
    [("ext4", True), ("xfs", True), ("btrfs", True), ("overlay", True), ("tmpfs", False)],
)
def test_which_filesystems_have_a_map_of_extents(
    kind: str, has: bool, filesystem: Callable[[str], Path]
) -> None:
    with opened(write_layer(filesystem(kind) / "file", PAGE, [])) as fd:
        assert sparse.has_map(fd) == has


def test_read_into_fills_by_many_short_reads_and_stops_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = signed(3, 0, PAGE)
    path = write_layer(tmp_path / "file", PAGE, [(0, content)])
    preadv = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        return preadv(fd, [buffers[0][:100]], offset, flags)

    monkeypatch.setattr(os, "preadv", short)
    with opened(path) as fd:
        buffer = bytearray(PAGE)
        assert sparse.read_into(fd, memoryview(buffer)[:1000], 50) == 1000
        assert bytes(buffer) == content[50:1050] + bytes(PAGE - 1000)
        assert sparse.read_into(fd, memoryview(buffer), PAGE - 30) == 30
        assert sparse.read_into(fd, memoryview(buffer), PAGE) == 0
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
