"""What one read costs the program: in its handler alone, and through a mount on one CPU.

A script, not a test: ``python -m tests.bench.readpath [reads [directory]]``. The view has 13,000
scattered dirty pages over a base of 256 MiB, dealt among one diff and among 32, all in the page
cache. `operations.read` is called directly, as pyfuse3 would call it, and its time is the program's
own. The mount is read through a private mapping, 4 KiB at random, by a client on the same CPU as
the server, and from beginning to end, beside a pyfuse3 server that answers a constant: the
difference of the two is ours. With --drop-behind the layers come from the disk each time. Handler
and server are measured by the processor's time that they take, so that a busy machine changes
little.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pyfuse3
import trio

from diffmergefs.core import sparse
from diffmergefs.fuse.access import Access
from diffmergefs.fuse.nodes import ROOT_INODE, OpenImage
from diffmergefs.fuse.operations import Operations
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.images import open_chain
from tests.support.mounts import mounted
from tests.support.randomchains import open_view

PAGE = 4096
SIZE = 256 << 20
DIRTY = 13_000
ROUNDS = 7
_EXT4_MAGIC = 0xEF53
CTX: Any = SimpleNamespace(pid=1)


def write_chain(directory: Path, depth: int) -> tuple[Path, list[Path]]:
    """A base full of data, and so many diffs that share out the same dirty pages."""
    chance = random.Random(1)
    directory.mkdir()
    base = directory / "base"
    block = random.Random(0).randbytes(1 << 20)
    with base.open("wb") as file:
        for _ in range(SIZE // len(block)):
            file.write(block)
    dirty = chance.sample(range(SIZE // PAGE), DIRTY)
    diffs = [directory / f"diff-{n}" for n in range(depth)]
    for number, path in enumerate(diffs):
        with path.open("wb") as file:
            file.truncate(SIZE)
            for page in dirty[number::depth]:
                os.pwrite(file.fileno(), block[:PAGE], page * PAGE)
    return base, diffs


async def microseconds(operations: Operations, fh: int, size: int, reads: int) -> float:
    """The median of the rounds, each of so many reads, per read."""
    chance = random.Random(2)
    offsets = [chance.randrange(SIZE // size) * size for _ in range(reads)]
    rounds = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        for offset in offsets:
            await operations.read(fh, offset, size)
        rounds.append((time.thread_time() - began) * 1e6 / reads)
    return statistics.median(rounds[1:])


async def in_the_handler(base: Path, diffs: list[Path], reads: int) -> None:
    view = open_chain(base, diffs).view
    operations = Operations(
        Tree("/nowhere", explicit=OpenImage.of(view, "base", Access(0, 0, 0o400)))
    )
    inode = (await operations.lookup(ROOT_INODE, b"base", CTX)).st_ino
    fh = (await operations.open(inode, os.O_RDONLY, CTX)).fh
    assert len(await operations.read(fh, 0, SIZE)) == SIZE
    for size in (PAGE, 128 << 10, 1 << 20):
        count = reads if size == PAGE else reads * PAGE * 8 // size
        took = await microseconds(operations, fh, size, count)
        print(f"  {size >> 10:5d} KiB: {took:7.2f} us a read, {size / took / 1024:6.2f} GiB/s")
    view.close()


async def of_a_slow_store(base: Path, diffs: list[Path]) -> None:
    """Eight clients of layers whose every read takes 5 ms, as on a network: they wait together."""
    # As if they were not on a tmpfs, which is never slow.
    with mock.patch.object(sparse, "filesystem_magic", return_value=_EXT4_MAGIC):
        view = open_view([base, *diffs])
    operations = Operations(
        Tree("/nowhere", explicit=OpenImage.of(view, "base", Access(0, 0, 0o400)))
    )
    inode = (await operations.lookup(ROOT_INODE, b"base", CTX)).st_ino
    fh = (await operations.open(inode, os.O_RDONLY, CTX)).fh
    preadv = os.preadv

    def slow(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, "slow")
        time.sleep(0.005)
        return preadv(fd, buffers, offset)

    async def client(number: int) -> None:
        for n in range(50):
            await operations.read(fh, (number * 50 + n) * PAGE, PAGE)

    with mock.patch.object(os, "preadv", slow):
        for clients in (1, 8):
            began = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for number in range(clients):
                    nursery.start_soon(client, number)
            each = (time.perf_counter() - began) / 50 / clients
            print(f"  {clients} clients of a store of 5 ms: {each * 1e3:5.2f} ms a read")
    view.close()


def cpu_seconds(pid: int) -> float:
    """The processor's time that the threads of the process have taken."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def first_touches(path: Path, reads: int) -> None:
    """Touch so many random pages, none of them in the page cache, each a request."""
    numbers = random.Random(3).sample(range(SIZE // PAGE), reads)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ) as view:
            view.madvise(mmap.MADV_RANDOM)
            for number in numbers:
                view[number * PAGE]


def whole(path: Path, reads: int) -> None:
    """Read it from beginning to end, with nothing in the page cache."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.readinto(buffer):
            pass


def measure(name: str, pid: int, path: Path, reads: int) -> None:
    """Print what a first touch, and a MiB in order, take: by the clock, and of the server."""
    pin(pid, {max(os.sched_getaffinity(0))})
    said = []
    for what, work, count in (("touch", first_touches, reads), ("MiB", whole, SIZE >> 20)):
        clock, server = [], []
        for _ in range(ROUNDS):
            began, before = time.perf_counter(), cpu_seconds(pid)
            work(path, reads)
            server.append((cpu_seconds(pid) - before) * 1e6 / count)
            clock.append((time.perf_counter() - began) * 1e6 / count)
        took = statistics.median(clock[1:]), statistics.median(server[1:])
        said.append(f"{took[0]:7.2f} us a {what}, {took[1]:7.2f} of the server")
    print(f"  {name}: " + "; ".join(said))


class Constant(pyfuse3.Operations):
    """One file whose every read is answered with the same zeros: what the runtime itself costs."""

    _zeros = bytes(1 << 20)

    async def lookup(self, parent: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        return await self.getattr(2, ctx)

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_size = inode, SIZE
        entry.st_mode = 0o40755 if inode == ROOT_INODE else 0o100444
        entry.entry_timeout = entry.attr_timeout = 3600
        return entry

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=1, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return memoryview(self._zeros)[:size]  # type: ignore[return-value]


def serve_constant(mountpoint: str) -> None:
    pyfuse3.init(Constant(), mountpoint, {"fsname=constant", "ro"})
    try:
        print("up", flush=True)
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


@contextmanager
def constant(mountpoint: Path) -> Iterator[int]:
    command = [sys.executable, "-m", "tests.bench.readpath", "--constant", str(mountpoint)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None and server.stdout.readline() == b"up\n"
        yield server.pid
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=False)
        server.kill()  # another namespace may still have the mount
        server.wait()


def pin(pid: int, cpus: set[int]) -> None:
    for task in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(task), cpus)


def through_a_mount(base: Path, diffs: list[Path], mountpoint: Path, reads: int) -> None:
    everywhere = os.sched_getaffinity(0)
    options = ["--base", str(base)] + [text for d in diffs for text in ("--diff", str(d))]
    os.sched_setaffinity(0, {max(everywhere)})
    try:
        with constant(mountpoint) as pid:
            measure("a constant", pid, mountpoint / "any", reads)
        with mounted(None, mountpoint, *options) as mount:
            measure("the view  ", mount.pid, mountpoint / "base", reads)
        with mounted(None, mountpoint, "--drop-behind", *options) as mount:
            measure("dropping  ", mount.pid, mountpoint / "base", reads)
    finally:
        os.sched_setaffinity(0, everywhere)


def main(reads: int = 20_000, directory: str | None = None) -> None:
    for depth in (1, 32):
        with tempfile.TemporaryDirectory(dir=directory) as place:
            base, diffs = write_chain(Path(place) / "chain", depth)
            print(f"{depth} diffs, in the handler:")
            trio.run(in_the_handler, base, diffs, reads)
            trio.run(of_a_slow_store, base, diffs)
            print(f"{depth} diffs, through a mount, client and server on one CPU:")
            mountpoint = Path(place) / "mountpoint"
            mountpoint.mkdir()
            through_a_mount(base, diffs, mountpoint, min(reads, SIZE // PAGE))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--constant"]:
        serve_constant(sys.argv[2])
    else:
        _, *given = sys.argv
        main(int(given[0]) if given else 20_000, given[1] if given[1:] else None)
