"""A FUSE file system of our own, whose files fail to be read where they are told to.

Run as a program it shows the regular files of a directory, read-only. A file `NAME.bad`
beside the file `NAME` names its bad bytes: lines of `start stop`. It is read at each request, so
that what is bad can change at any time. A file `NAME.slow` holds the seconds that each read of NAME
takes, however many are read at once. While there is a file `.hung`, no lookup, read or close of any
other is answered. There is no lseek: every file is dense here. As `nostatfs` it
does not know statfs(2) either.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyfuse3
import trio
from pyfuse3 import FUSEError

from tests.support import mounts, mounttable, skips
from tests.support.places import REPOSITORY

_TIMEOUT_SECONDS = 60
_HUNG = ".hung"


@dataclass(frozen=True)
class Faulty:
    """The mounted file system at `path`, which shows the files of `source`."""

    path: Path
    source: Path

    def break_bytes(self, name: str, extents: Iterable[tuple[int, int]]) -> None:
        """Make just these byte ranges of the file bad from now on; EIO is what a reader gets."""
        lines = "".join(f"{start} {stop}\n" for start, stop in extents)
        new = self.source / f"{name}.new"
        new.write_text(lines, encoding="ascii")
        new.replace(self.source / f"{name}.bad")
        self.forget(name)

    def slow_down(self, name: str, seconds: float) -> None:
        """Have each read of the file take so long from now on."""
        new = self.source / f"{name}.new"
        new.write_text(f"{seconds}\n", encoding="ascii")
        new.replace(self.source / f"{name}.slow")

    @contextmanager
    def hung(self) -> Iterator[None]:
        """Inside, nothing is answered that may be asked of its server."""
        marker = self.source / _HUNG
        marker.touch()
        try:
            yield
        finally:
            marker.unlink()

    def forget(self, name: str) -> None:
        """Drop the file's pages that the kernel keeps, so that each is asked for again."""
        with (self.path / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def mounted(
    source: Path, mountpoint: Path, *, statfs: bool = True, forgetful: bool = False
) -> Iterator[Faulty]:
    """The files of `source`, shown on the directory `mountpoint` by a process of its own.

    With `forgetful` the kernel asks for each name whenever it is used.
    """
    skips.require_fuse()
    real = os.path.realpath(mountpoint)
    kind = "forgetful" if forgetful else "faulty" if statfs else "nostatfs"
    command = [sys.executable, "-m", "tests.support.faulty", str(source), real, kind]
    root = REPOSITORY
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        yield Faulty(mountpoint, source)
    finally:
        if mounttable.at(real):
            mounttable.unmount(real)
        try:
            process.wait(_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            mounts.abort(real)
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


class _Operations(pyfuse3.Operations):
    _name_seconds = 3600

    def __init__(self, source: Path) -> None:
        super().__init__()
        self._source = source
        self._names: dict[int, str] = {}
        self._fds: dict[int, int] = {}

    async def _until_it_goes_on(self) -> None:
        while (self._source / _HUNG).exists():
            await trio.sleep(0.02)

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        await self._until_it_goes_on()
        try:
            status = os.stat(self._source / os.fsdecode(name))
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from error
        return self._entry(os.fsdecode(name), status)

    def _entry(self, name: str, status: os.stat_result) -> pyfuse3.EntryAttributes:
        self._names[status.st_ino] = name
        entry = _attributes(status.st_ino, status)
        entry.entry_timeout = self._name_seconds
        return entry

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if inode == pyfuse3.ROOT_INODE:
            return _attributes(inode, os.stat(self._source))
        return _attributes(inode, os.stat(self._source / self._names[inode]))

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        status, known = pyfuse3.StatvfsData(), os.statvfs(self._source)
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_namemax"):
            setattr(status, name, getattr(known, name))
        status.f_files = status.f_ffree = status.f_favail = 0
        return status

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        await self._until_it_goes_on()
        names = sorted(name for name in os.listdir(self._source) if not name.startswith("."))
        for number, name in enumerate(names[start_id:], start_id + 1):
            status = os.stat(self._source / name)
            entry = self._entry(name, status)
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, number):
                return

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        fd = os.open(self._source / self._names[inode], os.O_RDONLY | os.O_CLOEXEC)
        self._fds[fd] = inode
        return pyfuse3.FileInfo(fh=fd, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self._until_it_goes_on()
        name = self._names[self._fds[fh]]
        if any(start < off + size and off < stop for start, stop in self._bad(name)):
            raise FUSEError(errno.EIO)
        if seconds := self._delay(name):
            await trio.sleep(seconds)
        return os.pread(fh, size, off)

    async def release(self, fh: int) -> None:
        del self._fds[fh]
        os.close(fh)

    async def flush(self, fh: int) -> None:
        await self._until_it_goes_on()

    async def fsync(self, fh: int, datasync: bool) -> None:
        pass

    def _delay(self, name: str) -> float:
        try:
            return float((self._source / f"{name}.slow").read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0

    def _bad(self, name: str) -> list[tuple[int, int]]:
        try:
            text = (self._source / f"{name}.bad").read_text(encoding="ascii")
        except FileNotFoundError:
            return []
        found = [tuple(map(int, line.split())) for line in text.splitlines()]
        return cast(list[tuple[int, int]], found)


class _Forgetful(_Operations):
    _name_seconds = 0


class _WithoutStatfs(_Operations):
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        raise FUSEError(errno.ENOSYS)


_KINDS = {"faulty": _Operations, "forgetful": _Forgetful, "nostatfs": _WithoutStatfs}


def _attributes(inode: int, status: os.stat_result) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = inode
    entry.generation = 0
    entry.entry_timeout = entry.attr_timeout = 3600
    entry.st_mode, entry.st_nlink, entry.st_size = status.st_mode, 1, status.st_size
    entry.st_uid, entry.st_gid, entry.st_rdev = status.st_uid, status.st_gid, 0
    entry.st_blksize, entry.st_blocks = 4096, -(-status.st_size // 512)
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = status.st_mtime_ns
    return entry


def _serve(source: Path, mountpoint: str, kind: str) -> None:
    operations = _KINDS[kind](source)
    pyfuse3.init(operations, mountpoint, {"fsname=faulty", f"subtype={kind}", "ro"})
    try:
        print("up", flush=True)
        trio.run(pyfuse3.main, 1, 1000)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), *sys.argv[2:])
