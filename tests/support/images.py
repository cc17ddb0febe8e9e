"""Layer files whose bytes tell where they come from, and what a chain must show."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

PAGE = 4096

_CELL = 16
_CELL_NAMES = [f"{start:03x}" for start in range(0, PAGE, _CELL)]
_MAX_LAYER = 0xFFF
_MAX_OFFSET = 1 << 48


def signed(layer: int, offset: int, length: int) -> bytes:
    """The `length` bytes that belong at `offset` of this layer.

    Each aligned cell of 16 bytes reads, in ASCII and hexadecimal,
    ``<layer: 3 digits>:<the cell's own offset in the file: 12 digits>``. So a
    byte that shows up in the wrong place, or from the wrong layer, is seen, and
    no byte is ever zero. Offset and length need not be aligned.
    """
    if not 0 <= layer <= _MAX_LAYER:
        raise ValueError(f"layer {layer} is not in 0..{_MAX_LAYER}")
    if offset < 0 or length < 0 or offset + length > _MAX_OFFSET:
        raise ValueError(f"bytes {offset}..{offset + length} are not in 0..{_MAX_OFFSET}")
    first = offset // PAGE
    end = -(-(offset + length) // PAGE)
    text = "".join(_signed_page(layer, page) for page in range(first, end))
    skipped = offset - first * PAGE
    return text[skipped : skipped + length].encode("ascii")


def write_layer(path: Path, size: int, extents: Iterable[tuple[int, bytes]]) -> Path:
    """Make a sparse file of `size` bytes that holds data only in the extents.

    Each extent is (offset, data), within the size; later ones overwrite. The
    data is on the disk when this returns, so that the file system has settled
    where the holes are. Returns the path.
    """
    with path.open("wb", buffering=0) as file:
        file.truncate(size)
        for offset, data in extents:
            _check_within(size, offset, data)
            done = 0
            while done < len(data):
                done += os.pwrite(file.fileno(), data[done:], offset + done)
        os.fsync(file.fileno())
    return path


def store_mapped(path: Path, extents: Iterable[tuple[int, bytes]], advice: int = 0) -> None:
    """Read the whole file, and then store the extents in it through a shared mapping.

    So ext4 and xfs make data of all of each folio that is cached there, and tmpfs of a huge page
    where it may have one (`advice`: MADV_HUGEPAGE). Synced when this returns.
    """
    with path.open("r+b", buffering=0) as file:
        while file.read(1 << 20):
            pass
        with mmap.mmap(file.fileno(), 0) as memory:
            if advice:
                memory.madvise(advice)
            for offset, data in extents:
                memory[offset : offset + len(data)] = data
            memory.flush()
        os.fsync(file.fileno())


def another_name(path: Path, how: str, at: Path) -> Path:
    """The same file by a 'hard link' or a 'symlink' that is made `at`, or else by its own path."""
    match how:
        case "hard link":
            os.link(path, at)
        case "symlink":
            at.symlink_to(path)
        case _:
            return path
    return at


def overlay_oracle(size: int, layers: Sequence[Sequence[tuple[int, bytes]]]) -> bytes:
    """What `size` bytes hold once the layers' extents were written one after another.

    The layers are (offset, data) extents, the base first; what none of them
    writes is zero.
    """
    memory = bytearray(size)
    for layer in layers:
        for offset, data in layer:
            _check_within(size, offset, data)
            memory[offset : offset + len(data)] = data
    return bytes(memory)


def _signed_page(layer: int, page: int) -> str:
    # The names of a page's cells differ in their last three digits only, so one
    # join makes the page; a loop over cells would take most of a test's time.
    start = f"{layer:03x}:{page:09x}"
    return start + start.join(_CELL_NAMES)


def _check_within(size: int, offset: int, data: bytes) -> None:
    if offset < 0 or offset + len(data) > size:
        raise ValueError(f"bytes {offset}..{offset + len(data)} are outside of {size} bytes")


def offset_in_page(buffer: memoryview) -> int:
    """How far after the start of a page the buffer begins in memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % mmap.PAGESIZE
