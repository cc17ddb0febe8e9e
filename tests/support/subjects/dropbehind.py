"""Layers, what the page cache holds of them, and which advice the kernel gets."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.images import PAGE, signed, write_layer

#: The numbers of pages, by file.
Advised = dict[Path, set[int]]


MIB = 1 << 20


SIZE = 16 * MIB


# The diff has the odd MiB of the first eight.
RUNS = [(0, [(0, SIZE)]), (1, [(n * MIB, MIB) for n in (1, 3, 5, 7)])]


LAYERS = [[(start, signed(n, start, length)) for start, length in runs] for n, runs in RUNS]


def write_layers(directory: Path) -> list[Path]:
    """The base and the diff, with none of their pages in the page cache."""
    paths = [write_layer(directory / f"{n}.mem", SIZE, layer) for n, layer in enumerate(LAYERS)]
    forget(*paths)
    return paths


def forget(*paths: Path) -> None:
    """Have none of their pages in the page cache. (To open a layer reads its first bytes.)"""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path: Path, *mebibytes: int) -> None:
    """Have just these MiB of the file in the page cache."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for n in mebibytes:
            os.preadv(file.fileno(), [bytearray(MIB)], n * MIB)


LIBC = ctypes.CDLL(None, use_errno=True)


LIBC.mmap.restype = ctypes.c_void_p


LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


@contextmanager
def mapped(path: Path, length: int) -> Iterator[tuple[int, ctypes.c_void_p]]:
    """A descriptor of the file, and the address of a mapping of its first bytes."""
    with path.open("rb", buffering=0) as file:
        address = LIBC.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        try:
            yield file.fileno(), ctypes.c_void_p(address)
        finally:
            LIBC.munmap(ctypes.c_void_p(address), ctypes.c_size_t(length))


def cached(path: Path) -> set[int]:
    """The MiB of the file of which any page is in the page cache, by mincore(2).

    A read with RWF_NOWAIT can't tell: where it misses, the kernel reads ahead.
    """
    found = ctypes.create_string_buffer(SIZE // PAGE)
    with mapped(path, SIZE) as (_, address):
        assert LIBC.mincore(address, ctypes.c_size_t(SIZE), found) == 0
    pages = [n for n, flags in enumerate(found.raw) if flags & 1]
    return {page * PAGE // MIB for page in pages}


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> Advised:
    """The whole pages, by file, that the kernel is advised to drop; it is."""
    found: Advised = {}
    real = os.posix_fadvise

    def noted(fd: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            end = offset + length if length else SIZE
            inner = range(-(-offset // PAGE), end // PAGE)
            found.setdefault(Path(os.readlink(f"/proc/self/fd/{fd}")), set()).update(inner)
        real(fd, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    return found


def of_mebibytes(*numbers: int) -> set[int]:
    """The numbers of all pages of these MiB."""
    return {page for n in numbers for page in range(n * MIB // PAGE, (n + 1) * MIB // PAGE)}
