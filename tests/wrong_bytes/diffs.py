"""How a diff comes to be, and what happens to it where it lies.

Each is called with a path. It returns what it wrote there, as (offset, bytes) in the order in which
it was written: that, laid over the parent, is what a view must show.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.images import PAGE, signed, write_layer

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


def page_written_later(path: Path) -> Extents:
    """A write, which copies a lower file of an overlay up; what is written then is right."""
    extents = [(12 * MIB, signed(2, 12 * MIB, PAGE))]
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), extents[0][1], extents[0][0])
        os.fsync(file.fileno())
    return extents


def change_of_mode(path: Path) -> Extents:
    """A chmod, which copies a lower file of an overlay up."""
    path.chmod(0o640)
    return []
