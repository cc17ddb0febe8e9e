"""Diffs with copy-on-write reservations, as xfs makes them, and what readers do to their holes."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.images import PAGE, signed, write_layer

SIZE = 2 << 20
STEP = 128 << 10  # what xfs reserves around a page that it may not overwrite

OLD = [(offset, signed(1, offset, PAGE)) for offset in range(0, SIZE, STEP)]
NEW = [(offset, signed(2, offset, PAGE)) for offset in range(0, SIZE, STEP)]
#: What is data in it.
DATA = [(offset, offset + PAGE) for offset, _ in NEW]


def write_again(path: Path, extents: list[tuple[int, bytes]] = NEW) -> list[tuple[int, bytes]]:
    """Write these over a file whose blocks may be shared, and fsync it; gives them."""
    with path.open("r+b", buffering=0) as file:
        for offset, content in extents:
            os.pwrite(file.fileno(), content, offset)
        os.fsync(file.fileno())
    return extents


def write_reserved(path: Path) -> Path:
    """A diff that was copied by reflink, written again, and read; its data are `NEW`.

    Its holes are in the page cache over space that is reserved, so that SEEK_DATA calls them data.
    """
    original = write_layer(path.with_name(f"{path.name}.original"), SIZE, OLD)
    subprocess.run(["cp", "--reflink=always", original, path], check=True)
    write_again(path)
    original.unlink()
    path.read_bytes()
    return path


@contextmanager
def mapped(path: Path) -> Iterator[None]:
    """While the whole file is mapped and every page of it was touched."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory,
    ):
        assert sum(memory[offset] for offset in range(0, len(memory), PAGE)) >= 0
        yield
