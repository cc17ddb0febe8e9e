"""--drop-behind: the layers' pages leave the page cache once they were served, and no others do.

That pages stay is told by the advice that is given: the kernel may reclaim any page at any time.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from diffmergefs.fuse.access import Access
from diffmergefs.fuse.dropbehind import DropBehind, drop
from diffmergefs.fuse.nodes import ROOT_INODE, OpenImage
from diffmergefs.fuse.operations import Operations
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.images import open_chain
from tests.support.images import PAGE, overlay_oracle
from tests.support.live import until
from tests.support.mounts import mounted
from tests.support.subjects.dropbehind import (
    LAYERS,
    LIBC,
    MIB,
    SIZE,
    Advised,
    advised,
    cached,
    mapped,
    of_mebibytes,
    warm,
    write_layers,
)

__all__ = ["advised"]

CTX: Any = SimpleNamespace(pid=1)


@contextmanager
def locked(path: Path, length: int) -> Iterator[int]:
    """A descriptor of the file, whose first bytes the kernel has, and cannot reclaim meanwhile."""
    with mapped(path, length) as (fd, address):
        assert LIBC.mlock(address, ctypes.c_size_t(length)) == 0, os.strerror(ctypes.get_errno())
        yield fd


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_what_was_served_is_dropped_and_its_neighbours_stay(
    kind: str, filesystem: Callable[[str], Path], advised: Advised
) -> None:
    base, diff = write_layers(filesystem(kind))
    warm(base, 0, 1, 2, 4, 9, 10)
    warm(diff, 1, 3)
    dropping = DropBehind()
    with open_chain(base, [diff]).view as view:
        advised.clear()
        # In pieces that end within pages: together they are whole.
        for start, stop in ((0, 1000), (1000, MIB + 7), (MIB + 7, 3 * MIB), (9 * MIB, 10 * MIB)):
            view.read(start, stop - start)
            dropping.served(view, start, stop - start)
        dropping.close()
        # The base's own MiB 1 lies under the diff's: whoever reads in order has it read ahead.
        assert advised == {base: of_mebibytes(0, 1, 2, 9), diff: of_mebibytes(0, 1, 2)}
        assert not cached(base) & {0, 1, 2, 9} and not cached(diff) & {1}
        assert view.read(0, SIZE) == overlay_oracle(SIZE, LAYERS)


def test_what_is_in_memory_alone_is_not_lost(filesystem: Callable[[str], Path]) -> None:
    base, diff = write_layers(filesystem("tmpfs"))
    with open_chain(base, [diff]).view as view:
        drop(view, 0, SIZE)
        assert view.read(0, SIZE) == overlay_oracle(SIZE, LAYERS)


def test_parts_of_pages_and_dirty_pages_stay(
    filesystem: Callable[[str], Path], advised: Advised
) -> None:
    path = write_layers(filesystem("ext4"))[0]
    with open_chain(path).view as view:
        advised.clear()
        drop(view, 2 * MIB + 1, 2 * MIB + PAGE)
        drop(view, 2 * MIB + 5 * PAGE - 1, 2 * MIB + 6 * PAGE - 1)
        assert advised == {path: set()}
        with path.open("r+b", buffering=0) as file:
            file.write(b"new")
            drop(view, 0, PAGE)
    assert path.read_bytes()[:3] == b"new"


def test_a_large_folio_across_the_end_of_a_batch_is_dropped_with_the_next(
    filesystem: Callable[[str], Path],
) -> None:
    base, _ = write_layers(filesystem("ext4"))
    view = open_chain(base).view
    with base.open("rb", buffering=0) as file:  # large folios come by reading ahead
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(128 << 10):
            pass
    middle = 9 * MIB + PAGE
    dropping = DropBehind()
    dropping.served(view, 0, middle)
    until(lambda: not cached(base) & set(range(9)), "the first batch stays")
    dropping.served(view, middle, SIZE - middle)
    dropping.close()
    assert cached(base) == set()


def test_a_mount_drops_its_layers_pages_and_keeps_its_own(
    public_path: Path, mountpoint: Path
) -> None:
    base, diff = write_layers(public_path)
    options = ["--drop-behind", "--base", str(base), "--diff", str(diff)]
    with mounted(None, mountpoint, *options), ExitStack() as stack:
        view = mountpoint / base.name
        held = stack.enter_context(locked(view, 4 * MIB))
        assert view.read_bytes() == overlay_oracle(SIZE, LAYERS)
        # What was read ahead of the end of a batch, and is hidden there, may stay.
        until(lambda: not cached(diff) & {1, 3, 5, 7}, "the diff's pages stay")
        until(lambda: cached(base) <= {1, 3, 5, 7}, "the base's pages stay")
        # The kernel does not ask again for what it has, and what is locked it has.
        for path in (base, diff):
            os.utime(path)
        assert os.pread(held, 4 * MIB, 0) == overlay_oracle(SIZE, LAYERS)[: 4 * MIB]


def test_without_it_no_page_is_dropped(tmp_path: Path, advised: Advised) -> None:
    base, diff = write_layers(tmp_path)
    image = open_chain(base, [diff])
    shown = OpenImage.of(image.view, "image", Access(0, 0, 0o400))
    operations = Operations(Tree("/nowhere", explicit=shown))

    async def read() -> None:
        entry = await operations.lookup(ROOT_INODE, b"image", CTX)
        info = await operations.open(entry.st_ino, os.O_RDONLY, CTX)
        advised.clear()
        assert await operations.read(info.fh, 0, SIZE) == overlay_oracle(SIZE, LAYERS)
        await operations.release(info.fh)

    trio.run(read)
    assert advised == {}
