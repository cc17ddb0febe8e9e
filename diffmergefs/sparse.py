"""What a filesystem says about a sparse file: the only home of SEEK_DATA, SEEK_HOLE and FIEMAP."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
from collections.abc import Iterator

from diffmergefs.errors import UnsupportedPlatformError
from diffmergefs.extents import Extent

OVERLAYFS_MAGIC = 0x794C7630
NFS_MAGIC = 0x6969
TMPFS_MAGIC = 0x01021994
FUSE_MAGIC = 0x65735546

_FS_IOC_FIEMAP = 0xC020660B
_FS_IOC_GETFLAGS = 0x80086601
_FIEMAP_EXTENT_LAST = 0x1
_FIEMAP_EXTENT_UNWRITTEN = 0x800
_FIEMAP_HEADER = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQQQIIII")
_FIEMAP_FLAGS = 10  # the word of an extent in which its flags are
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


def unwritten_ranges(fd: int, size: int) -> Iterator[Extent]:
    """The preallocated, unwritten ranges in `[0, size)`, in ascending order; they read as zeros.

    SEEK_DATA calls such a range data while its pages are cached, and no fsync changes that; only
    FIEMAP's UNWRITTEN flag tells. Nothing is synced: on a file with dirty pages a range may have
    been written already. None where the filesystem has no FIEMAP (tmpfs).
    """
    position = 0
    while position < size and (batch := _fiemap(fd, position, size - position)):
        asked = position
        for start, length, flags in batch:
            stop = min(start + length, size)
            if flags & _FIEMAP_EXTENT_UNWRITTEN and max(start, position) < stop:
                yield Extent(max(start, position), stop)
            position = max(position, stop)
            if flags & _FIEMAP_EXTENT_LAST:
                return
        if position == asked:  # not so, but for a filesystem that answers nonsense
            return


def _fiemap(fd: int, start: int, length: int) -> list[tuple[int, int, int]]:
    # Start, length and flags: of the extents of one batch those that are unwritten, and the last.
    request = bytearray(_FIEMAP_HEADER.size + _FIEMAP_BATCH * _FIEMAP_EXTENT.size)
    _FIEMAP_HEADER.pack_into(request, 0, start, length, 0, 0, _FIEMAP_BATCH, 0)
    try:
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
    except OSError as error:
        if error.errno in _NO_FIEMAP:
            return []
        raise
    mapped = _FIEMAP_HEADER.unpack_from(request)[3]
    fields = memoryview(request)[_FIEMAP_HEADER.size :][: mapped * _FIEMAP_EXTENT.size]
    # Mostly none is unwritten: to unpack all would take longer than the call.
    flags = fields.cast("I")[_FIEMAP_FLAGS :: _FIEMAP_EXTENT.size // 4].tolist()
    found = [n for n, flag in enumerate(flags) if flag & _FIEMAP_EXTENT_UNWRITTEN]
    if mapped and mapped - 1 not in found[-1:]:
        found.append(mapped - 1)
    extents = (_FIEMAP_EXTENT.unpack_from(fields, n * _FIEMAP_EXTENT.size) for n in found)
    return [(e[0], e[2], e[5]) for e in extents]


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
