"""Reads that must wait do so in parallel, in their own buffers, and never in the event loop."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from pyfuse3 import FUSEError

from diffmergefs.fuse.access import Access
from diffmergefs.fuse.nodes import ROOT_INODE, OpenImage
from diffmergefs.fuse.operations import Operations
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.images import open_chain
from tests.support.images import PAGE, overlay_oracle, signed, write_layer

CLIENTS = 8
SIZE = 64 * PAGE
CTX: Any = SimpleNamespace(pid=1)


class SlowStore:
    """Replaces os.preadv: no page of the slow layers is in the page cache.

    A read that may wait does so until as many of them are under way as `together` says, which
    fails the test if they come one after another.
    """

    def __init__(self, slow: set[str], together: int) -> None:
        self._preadv = os.preadv
        self._slow = slow
        self._meet = threading.Barrier(together)
        self.threads: set[int] = set()
        self.asked: list[tuple[str, int, int]] = []

    def __call__(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        if name in self._slow:
            if flags & os.RWF_NOWAIT:
                raise BlockingIOError(errno.EAGAIN, "not in the page cache")
            self.threads.add(threading.get_ident())
            self._meet.wait(20)
        self.asked.append((name, offset, sum(map(len, buffers))))
        return self._preadv(fd, buffers, offset, flags)


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[tuple[Operations, bytes]]:
    """A served chain: the base has the even pages, the diff some odd ones."""
    layers = [
        [(n * PAGE, signed(0, n * PAGE, PAGE)) for n in range(0, 64, 2)],
        [(n * PAGE, signed(1, n * PAGE, PAGE)) for n in range(1, 32, 2)],
    ]
    paths = [write_layer(tmp_path / f"{n}.mem", SIZE, extents) for n, extents in enumerate(layers)]
    image = open_chain(paths[0], paths[1:])
    with image.view as view:
        view.read(0, SIZE)
        shown = OpenImage.of(image.view, "0.mem", Access(0, 0, 0o400))
        yield Operations(Tree("/somewhere", explicit=shown)), overlay_oracle(SIZE, layers)


async def opened(operations: Operations) -> int:
    entry = await operations.lookup(ROOT_INODE, b"0.mem", CTX)
    return (await operations.open(entry.st_ino, os.O_RDONLY, CTX)).fh


def test_readers_of_a_slow_layer_wait_in_parallel_and_others_do_not_wait(
    chain: tuple[Operations, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    operations, oracle = chain
    # The barrier breaks unless all eight are in their reads at once.
    store = SlowStore({"1.mem"}, CLIENTS)
    found: dict[int, bytes] = {}

    async def read(fh: int, offset: int, size: int) -> None:
        found[offset] = bytes(await operations.read(fh, offset, size))

    async def main() -> None:
        fh = await opened(operations)
        monkeypatch.setattr(os, "preadv", store)
        async with trio.open_nursery() as nursery:
            for n in range(CLIENTS - 1):
                nursery.start_soon(read, fh, (2 * n + 1) * PAGE, PAGE)
            await trio.testing.wait_all_tasks_blocked()
            # While seven wait in threads, the event loop answers reads of the base's pages.
            assert not found
            for page in (0, 2, 40):
                assert await operations.read(fh, page * PAGE, PAGE) == oracle[page * PAGE :][:PAGE]
            nursery.start_soon(read, fh, 21 * PAGE, PAGE)

    trio.run(main)
    assert len(found) == CLIENTS == len(store.threads)
    assert threading.get_ident() not in store.threads
    for offset, data in found.items():
        assert data == oracle[offset : offset + PAGE]


def test_one_thread_reads_exactly_the_rest_of_a_miss(
    chain: tuple[Operations, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    operations, oracle = chain
    store = SlowStore({"1.mem"}, 1)

    async def main() -> None:
        fh = await opened(operations)
        monkeypatch.setattr(os, "preadv", store)
        assert await operations.read(fh, 30 * PAGE, 6 * PAGE) == oracle[30 * PAGE : 36 * PAGE]

    trio.run(main)
    assert len(store.threads) == 1
    # Page 30 was cached, 31 was not. 33 and 35 are holes in all layers.
    asked = [("0.mem", 30), ("1.mem", 31), ("0.mem", 32), ("0.mem", 34)]
    assert store.asked == [(name, page * PAGE, PAGE) for name, page in asked]


def test_a_reused_buffer_holds_no_bytes_of_earlier_reads(
    chain: tuple[Operations, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once and in threads: holes are zeros, and no reply is longer than the request."""
    operations, oracle = chain

    async def main() -> None:
        fh = await opened(operations)
        for _ in range(3):
            for offset, size in ((0, SIZE), (31 * PAGE, 9 * PAGE), (60 * PAGE, 90 * PAGE), (5, 7)):
                assert await operations.read(fh, offset, size) == oracle[offset : offset + size]
            assert await operations.read(fh, SIZE, PAGE) == b""
            monkeypatch.setattr(os, "preadv", SlowStore({"0.mem", "1.mem"}, 1))

    trio.run(main)


def test_a_reply_stays_as_it_is_until_the_next_task_runs(
    chain: tuple[Operations, bytes],
) -> None:
    """pyfuse3 relies on it: between the return and the reply nothing else fills the buffer."""
    operations, oracle = chain
    wrong = 0

    async def client(fh: int, page: int) -> None:
        nonlocal wrong
        for _ in range(50):
            reply = await operations.read(fh, page * PAGE, PAGE)
            wrong += reply != oracle[page * PAGE :][:PAGE]
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        fh = await opened(operations)
        async with trio.open_nursery() as nursery:
            for page in range(16):
                nursery.start_soon(client, fh, page)

    trio.run(main)
    assert wrong == 0


def test_a_change_while_a_read_waits_is_seen(
    chain: tuple[Operations, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Law 6 also holds for bytes read before the wait: the base's, if the diff is slow."""
    operations, _ = chain
    preadv = os.preadv

    def changing(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("1.mem"):
            if flags & os.RWF_NOWAIT:
                raise BlockingIOError(errno.EAGAIN, "not in the page cache")
            os.utime(tmp_path / "0.mem")
        return preadv(fd, buffers, offset, flags)

    async def main() -> None:
        fh = await opened(operations)
        monkeypatch.setattr(os, "preadv", changing)
        with pytest.raises(FUSEError) as caught:
            await operations.read(fh, 0, 2 * PAGE)
        assert caught.value.errno == errno.EIO

    trio.run(main)
