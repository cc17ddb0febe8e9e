"""What a filesystem says about a sparse file: the only home of SEEK_DATA, SEEK_HOLE and FIEMAP."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import operator
import os
import struct
import sys
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from diffmergefs.core.errors import UnsupportedPlatformError
from diffmergefs.core.extents import ExtentList

OVERLAYFS_MAGIC = 0x794C7630
NFS_MAGIC = 0x6969
TMPFS_MAGIC = 0x01021994
FUSE_MAGIC = 0x65735546

_FS_IOC_FIEMAP = 0xC020660B
_FS_IOC_GETFLAGS = 0x80086601
_FIEMAP_FLAG_SYNC = 0x1
_FIEMAP_EXTENT_LAST = 0x1
_FIEMAP_EXTENT_DELALLOC = 0x4
_FIEMAP_EXTENT_UNWRITTEN = 0x800
_NOT_WRITTEN = _FIEMAP_EXTENT_DELALLOC | _FIEMAP_EXTENT_UNWRITTEN
_FIEMAP_HEADER = struct.Struct("=QQIIII")
# struct fiemap_extent: its bytes; in which 8 of them is the length, in which 4 the flags.
_FIEMAP_EXTENT = 56
_FIEMAP_LENGTH = 2
_FIEMAP_FLAGS = 10
_FIEMAP_BATCH = 1024
_NO_FIEMAP = frozenset({errno.EOPNOTSUPP, errno.ENOTTY})


def require_linux() -> None:
    """Raise UnsupportedPlatformError off Linux: nothing else reports holes as this needs them."""
    if sys.platform != "linux":
        raise UnsupportedPlatformError(
            f"data extents can be read on Linux only, this is {sys.platform}"
        )


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The ranges (start, stop) of `[0, size)` that the filesystem reports as data, ascending.

    `fd` is open for reading; its file position moves, nothing else does. Ranges are as the
    filesystem gives them, clipped to `size`: they may be adjacent, and they are as coarse as its
    grain. Nothing is synced: a caller that needs exact extents calls `os.fsync(fd)` first (btrfs
    walks a dirty file 30 times slower). Raises UnsupportedPlatformError off Linux and OSError as
    lseek(2) does.
    """
    require_linux()
    # To look these up for each call, and to make an Extent of each range, took a quarter of a walk.
    seek, data, hole = os.lseek, os.SEEK_DATA, os.SEEK_HOLE
    position = 0
    while position < size:
        try:
            start = seek(fd, position, data)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if start >= size:
            return
        stop = seek(fd, start, hole)
        position = stop if stop < size else size
        if start < position:  # not so if the data was punched out between the two calls
            yield start, position


class Walk(NamedTuple):
    """What a filesystem says of a file's data, and where its two answers differ.

    `data` are the ranges that SEEK_DATA reports and `unwritten` the preallocated ones, which may be
    among them or not. `unmapped` are data where the filesystem's own map (FIEMAP) has neither
    written bytes nor preallocated ones: the page cache makes holes look so, on xfs where space is
    reserved for copy-on-write. `unreported` is written by the map and a hole by SEEK_DATA, which no
    filesystem is known to say of a file that nobody writes to. Without FIEMAP (tmpfs, NFS) all but
    `data` are empty.
    """

    data: ExtentList
    unwritten: ExtentList
    unmapped: ExtentList
    unreported: ExtentList


def walk(fd: int, size: int) -> Walk:
    """The data of `[0, size)`, held against the filesystem's own map.

    Where that has less, the file's cached pages are dropped once and it is walked again, which
    moves no time stamp; pages that are dirty, or that a process has mapped, stay. Dirty ones are
    written back first where there is a map, as for `data_extents` the caller does. Raises as that.
    """
    found = _held_against_map(fd, size)
    if len(found.unmapped):
        _drop_cached(fd)
        found = _held_against_map(fd, size)
    return found


def stays_data(fd: int, offset: int) -> bool:
    """Whether SEEK_DATA calls the byte data even after the file's cached pages were dropped."""
    _drop_cached(fd)
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) == offset
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise


def _drop_cached(fd: int) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _held_against_map(fd: int, size: int) -> Walk:
    mapped = _fiemap(fd, size)
    data, none = ExtentList(data_extents(fd, size)), ExtentList()
    if mapped is None or mapped.is_just(data):
        return Walk(data, none, none, none)
    written = ExtentList(mapped.ranges(0))
    unwritten = ExtentList(mapped.ranges(_FIEMAP_EXTENT_UNWRITTEN))
    if data == written:
        return Walk(data, unwritten, none, none)
    unmapped = ExtentList(data.outside(written, unwritten))
    return Walk(data, unwritten, unmapped, ExtentList(written.outside(data)))


class _Mapped(NamedTuple):
    # The extents of a file's map, clipped to its size.
    starts: array[int]
    stops: array[int]
    flags: array[int]

    def add(self, fields: memoryview, count: int) -> None:
        # So many extents of a reply; to unpack one after another would take longer than the call.
        words = fields[: count * _FIEMAP_EXTENT].cast("Q")
        starts = words[:: _FIEMAP_EXTENT // 8].tolist()
        lengths = words[_FIEMAP_LENGTH :: _FIEMAP_EXTENT // 8].tolist()
        self.starts.extend(starts)
        self.stops.extend(map(operator.add, starts, lengths))
        self.flags.extend(words.cast("B").cast("I")[_FIEMAP_FLAGS :: _FIEMAP_EXTENT // 4].tolist())

    def is_just(self, data: ExtentList) -> bool:
        # Mostly it is: to join what is adjacent, and to compare the rest, takes ten times longer.
        written = not any(flag & _NOT_WRITTEN for flag in set(self.flags))
        return written and self.starts == data.starts and self.stops == data.stops

    def ranges(self, kind: int) -> Iterator[tuple[int, int]]:
        # Those of which these flags of `_NOT_WRITTEN` are set. A filesystem may repeat a part.
        position = 0
        for start, stop, flags in zip(self.starts, self.stops, self.flags, strict=True):
            start = max(start, position)
            if flags & _NOT_WRITTEN == kind and start < stop:
                yield start, stop
                position = stop


def _fiemap(fd: int, size: int) -> _Mapped | None:
    # None where the filesystem has no FIEMAP.
    found = _Mapped(array("Q"), array("Q"), array("I"))
    request = bytearray(_FIEMAP_HEADER.size + _FIEMAP_BATCH * _FIEMAP_EXTENT)
    # On btrfs what fsync wrote may not be in the map yet: this flag waits for it.
    position, sync = 0, _FIEMAP_FLAG_SYNC
    while position < size:
        _FIEMAP_HEADER.pack_into(request, 0, position, size - position, sync, 0, _FIEMAP_BATCH, 0)
        try:
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        except OSError as error:
            if error.errno in _NO_FIEMAP:
                return None
            raise
        count = _FIEMAP_HEADER.unpack_from(request)[3]
        found.add(memoryview(request)[_FIEMAP_HEADER.size :], count)
        if not found.stops or found.flags[-1] & _FIEMAP_EXTENT_LAST or found.stops[-1] <= position:
            break
        position, sync = found.stops[-1], 0
    if found.stops:
        found.stops[-1] = min(found.stops[-1], size)
    return found


def has_map(fd: int) -> bool:
    """Whether the filesystem gives a map of the extents of the regular file `fd` (FIEMAP)."""
    return _answers(fd, _FS_IOC_FIEMAP, _FIEMAP_HEADER.pack(0, 1, 0, 0, 0, 0))


def has_flags(fd: int) -> bool:
    """Whether the filesystem gives the flags of the file `fd` (ioctl_iflags(2))."""
    return _answers(fd, _FS_IOC_GETFLAGS, bytes(8))


def _answers(fd: int, request: int, argument: bytes) -> bool:
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError:
        return False
    return True


def filesystem_magic(fd: int) -> int:
    """The `f_type` of fstatfs(2): the magic number of the filesystem that holds `fd`.

    Only a FUSE server can lack statfs, so that is what such a filesystem is taken for.
    """
    # Python's statvfs leaves f_type out. It is the first word of struct statfs, whose size is
    # 120 bytes on 64-bit Linux; 256 leaves room everywhere.
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer) != 0:
        number = ctypes.get_errno()
        if number == errno.ENOSYS:
            return FUSE_MAGIC
        raise OSError(number, os.strerror(number))
    word = ctypes.c_long.from_buffer(buffer).value
    return word & 0xFFFFFFFF


_libc = ctypes.CDLL(None, use_errno=True)


def read_into(fd: int, buffer: memoryview, offset: int, flags: int = 0) -> int:
    """Fill `buffer` from `offset` on; the number of bytes read, less only at the end of the file.

    Positionless. `flags` are preadv2(2)'s: with RWF_NOWAIT a miss raises BlockingIOError, and then
    the buffer's contents are undefined. A full read takes one system call.
    """
    done = count = os.preadv(fd, (buffer,), offset, flags)
    while count and done < len(buffer):
        count = os.preadv(fd, (buffer[done:],), offset + done, flags)
        done += count
    return done
