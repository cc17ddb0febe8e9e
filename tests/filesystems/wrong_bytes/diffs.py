"""How a diff comes to be, and what happens to it where it lies.

Each is called with a path. It returns what it wrote there, as (offset, bytes) in the order in which
it was written: that, laid over the parent, is what a view must show.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from diffmergefs.opening.images import open_chain
from diffmergefs.writing.flatten import flatten
from tests.support.images import PAGE, signed, store_mapped, write_layer
from tests.support.reserved import STEP, write_again

SIZE = 16 << 20
MIB = 1 << 20

Extents = Sequence[tuple[int, bytes]]
Act = Callable[[Path], Extents]


def nothing(path: Path) -> Extents:
    """Nothing happens to it."""
    return []


def scattered_pages(path: Path) -> Extents:
    """Single pages, written zeros and a longer run, written with write(2)."""
    extents = [(n * PAGE, signed(1, n * PAGE, PAGE)) for n in (1, 7, 8, 700, 4095)]
    extents += [
        (100 * PAGE, bytes(PAGE)),
        (4 * MIB, bytes(MIB)),
        (8 * MIB, signed(1, 8 * MIB, MIB)),
    ]
    write_layer(path, SIZE, extents)
    return extents


def in_allocations_of_64_kib(path: Path) -> Extents:
    """The same on xfs, which stores 64 KiB for each page by a hint; then it is read.

    That makes data of what was stored and not written.
    """
    path.touch()
    subprocess.run(["xfs_io", "-c", "extsize 64k", path], check=True, capture_output=True)
    extents = scattered_pages(path)
    path.read_bytes()
    return extents


def copied_and_written_again(path: Path) -> Extents:
    """A copy that shares blocks where it can, of which a page in each 128 KiB is written again."""
    command: list[str | Path] = ["cp", "--reflink=auto", _shared(path), path]
    subprocess.run(command, check=True)
    return write_again(path, _AGAIN)


def flattened_and_written_again(path: Path) -> Extents:
    """A diff whose blocks `flatten` shares, written again in the same way."""
    diff = _shared(path)
    base = write_layer(path.with_name("flat.base"), SIZE, [])
    with open_chain(base, [diff]).view as view:
        flatten(view, path.with_name("flat"))
    diff.rename(path)
    return write_again(path, _AGAIN)


_AGAIN = [(offset, signed(2, offset, PAGE)) for offset in range(0, SIZE, STEP)]


def _shared(path: Path) -> Path:
    extents = [(offset, signed(1, offset, PAGE)) for offset, _ in _AGAIN]
    return write_layer(path.with_name("shared"), SIZE, extents)


def read_by_somebody(path: Path) -> Extents:
    """All of it is in the page cache then."""
    path.read_bytes()
    return []


def read_and_dropped(path: Path) -> Extents:
    """It was in the page cache, and is no longer."""
    read_by_somebody(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return []


def page_written_later(path: Path) -> Extents:
    """A write, which copies a lower file of an overlay up; what is written then is right."""
    extents = [(12 * MIB, signed(2, 12 * MIB, PAGE))]
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), extents[0][1], extents[0][0])
        os.fsync(file.fileno())
    return extents


def stored_through_a_mapping(path: Path) -> Extents:
    """Stores of single pages through a mapping of the file, which somebody has just read."""
    extents = [(n * PAGE, signed(3, n * PAGE, PAGE)) for n in (1300, 2500, 3300)]
    store_mapped(path, extents)
    return extents


def change_of_mode(path: Path) -> Extents:
    """A chmod, which copies a lower file of an overlay up."""
    path.chmod(0o640)
    return []
