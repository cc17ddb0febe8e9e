"""--drop-behind: the layers' pages leave the page cache once they were served, and no others do.

That pages stay is told by the advice that is given: the kernel may reclaim any page at any time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.access import Access
from diffmergefs.fuse.dropbehind import DropBehind, drop
from diffmergefs.fuse.nodes import ROOT_INODE, OpenImage
from diffmergefs.fuse.operations import Operations
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.images import open_chain
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.live import until
from tests.support.mounts import mounted

CTX: Any = SimpleNamespace(pid=1)
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


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


@contextmanager
def mapped(path: Path, length: int) -> Iterator[tuple[int, ctypes.c_void_p]]:
    """A descriptor of the file, and the address of a mapping of its first bytes."""
    with path.open("rb", buffering=0) as file:
        address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        try:
            yield file.fileno(), ctypes.c_void_p(address)
        finally:
            _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(length))


@contextmanager
def locked(path: Path, length: int) -> Iterator[int]:
    """A descriptor of the file, whose first bytes the kernel has, and cannot reclaim meanwhile."""
    with mapped(path, length) as (fd, address):
        assert _libc.mlock(address, ctypes.c_size_t(length)) == 0, os.strerror(ctypes.get_errno())
        yield fd


def cached(path: Path) -> set[int]:
    """The MiB of the file of which any page is in the page cache, by mincore(2).

    A read with RWF_NOWAIT can't tell: where it misses, the kernel reads ahead.
    """
    found = ctypes.create_string_buffer(SIZE // PAGE)
    with mapped(path, SIZE) as (_, address):
        assert _libc.mincore(address, ctypes.c_size_t(SIZE), found) == 0
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


def test_a_layer_that_supplied_nothing_keeps_its_pages(tmp_path: Path, advised: Advised) -> None:
    base, diff = write_layers(tmp_path)
    with open_chain(base, [diff]).view as view:
        advised.clear()
        drop(view, MIB, 2 * MIB)
    assert advised == {diff: of_mebibytes(1)}


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


def test_ranges_are_joined_before_they_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int, int, int]] = []
    base, diff = write_layers(tmp_path)
    with open_chain(base, [diff]).view as view:
        fds = [layer.fd for layer in view.layers]
        monkeypatch.setattr(os, "posix_fadvise", lambda *call: calls.append(call))
        dropping = DropBehind()
        for start, stop in ((50, 70), (0, 10), (10, 30), (60, 65), (70, 80), (MIB, MIB + 5)):
            dropping.served(view, start, stop - start)
        dropping.close()
    expected = [(fds[0], 0, 30), (fds[0], 50, 30), (fds[1], MIB, 5)]
    assert calls == [(*call, os.POSIX_FADV_DONTNEED) for call in expected]


def test_a_file_that_takes_no_advice_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, diff = write_layers(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError("on purpose")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    dropping = DropBehind()
    with open_chain(base, [diff]).view as view:
        dropping.served(view, 0, SIZE)
        dropping.close()
        assert view.read(0, SIZE) == overlay_oracle(SIZE, LAYERS)


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


def test_a_batch_is_dropped_at_once_and_a_little_after_a_while(tmp_path: Path) -> None:
    base, diff = write_layers(tmp_path)
    dropping = DropBehind()
    with open_chain(base, [diff]).view as view:
        forget(base)
        for start, length in ((8 * MIB, 8 * MIB), (0, MIB)):
            warm(base, *range(start // MIB, (start + length) // MIB))
            dropping.served(view, start, length)
            until(lambda: not cached(base), "the pages stay")
    dropping.close()


def test_it_keeps_no_layer_open_and_ends_when_nothing_was_served(tmp_path: Path) -> None:
    DropBehind().close()
    base, _ = write_layers(tmp_path)
    dropping = DropBehind()
    view = MergedView([Layer.open(str(base))])
    fd = view.layers[0].fd
    dropping.served(view, 0, MIB)
    until(lambda: not dropping._served, "nothing was taken")
    del view
    until(lambda: os.path.exists(f"/proc/self/fd/{fd}") is False, "the layer is held open")
    dropping.close()


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
