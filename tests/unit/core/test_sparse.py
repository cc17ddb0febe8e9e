"""Walking over the extents of a file, and errors on the way."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.errors import UnsupportedPlatformError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.core.sparse import BLOCK, page_aligned
from tests.support.descriptors import opened
from tests.support.images import PAGE, offset_in_page, signed, write_layer


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


def test_the_magic_number_of_no_file_is_an_oserror() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        sparse.filesystem_magic(-1)


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


@pytest.mark.parametrize("size", [1, mmap.PAGESIZE - 1, 1 << 18, 3 * BLOCK + 5])
def test_a_page_aligned_buffer_is_zeros_from_the_start_of_a_page(size: int) -> None:
    buffer = page_aligned(size)
    assert len(buffer) == size and not any(buffer)
    assert offset_in_page(buffer) == 0
    buffer[-1] = 7
    assert buffer[-1] == 7
