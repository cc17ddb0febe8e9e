"""Moving a range of a layer into a file: shared if the filesystem can, copied otherwise."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from diffmergefs.buffers import page_aligned
from diffmergefs.errors import DiffMergeError, FileAccessError, NoSpaceError
from diffmergefs.layer import Layer

BLOCK = 1 << 20

# Per call, so that progress moves and a signal is answered soon.
_KERNEL_CHUNK = 16 * BLOCK

_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("=qQQQ")

# Only what says that sharing or copying in the kernel is not possible here. ETXTBSY: a swap file.
_NO_CLONE = frozenset(
    {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ETXTBSY},
)
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
#: What says that there is no room for the output, or none left of the writer's quota.
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


class Target(NamedTuple):
    """A file that is written: its descriptor, open for reading and writing, and its path."""

    fd: int
    path: str


@contextmanager
def failures(path: str, target: Target | None = None) -> Iterator[None]:
    """Turn an OSError into one line: FileAccessError, with `path`.

    With `target`, the file that is written, no space (or quota) left is NoSpaceError.
    """
    try:
        yield
    except OSError as error:
        raise described(error, path, target) from error


def described(error: OSError, path: str, target: Target | None = None) -> DiffMergeError:
    """What `failures` raises in the place of `error`."""
    if target is None or error.errno not in NO_SPACE:
        return FileAccessError(f"{path}: {error.strerror or error}")
    return NoSpaceError(
        f"{target.path}: {error.strerror} while writing an image of"
        f" {os.fstat(target.fd).st_size} bytes, {free_bytes(target.fd)} are free on its"
        " filesystem; make room or write it elsewhere"
    )


def free_bytes(fd: int) -> int | None:
    """What an unprivileged user may still write on the filesystem of `fd`; None if it has no limit.

    A tmpfs without a limit, and some FUSE filesystems, report zero blocks in all.
    """
    status = os.fstatvfs(fd)
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def clone_file(layer: Layer, target: Target) -> bool:
    """Share all of the layer's blocks with the target, which has its size; False if impossible.

    Raises FileAccessError and NoSpaceError for any other failure.
    """
    return _clone(layer, target, _FICLONE, layer.fd)


def clone_range(layer: Layer, start: int, stop: int, target: Target) -> bool:
    """Share the blocks of `[start, stop)` with the same range of the target; False if impossible.

    Both ends lie on blocks of the filesystem, or `stop` is the end of both files. Raises like
    `clone_file`.
    """
    request = _CLONE_RANGE.pack(layer.fd, start, stop - start, start)
    return _clone(layer, target, _FICLONERANGE, request)


def _clone(layer: Layer, target: Target, operation: int, argument: int | bytes) -> bool:
    # Once for each page that lies scattered: a context manager would take longer than it should.
    try:
        fcntl.ioctl(target.fd, operation, argument)
    except OSError as error:
        if error.errno in _NO_CLONE:
            return False
        raise described(error, f"{layer.path} -> {target.path}", target) from error
    return True


def copy_range(
    layer: Layer, start: int, stop: int, target: Target, moved: Callable[[int], None]
) -> None:
    """Copy `[start, stop)` of the layer to the same range of the target; zeros stay data.

    By copy_file_range(2), and where that is not possible through a buffer of at most `BLOCK` bytes
    and no larger than the range. `moved` is called with the bytes of each step. Nothing is synced
    and the fingerprint is not compared: call `layer.settle` afterwards. Raises LayerChangedError
    if the layer ends early, FileAccessError, NoSpaceError.
    """
    position = start
    while position < stop:
        count = _copy_in_kernel(layer, position, stop, target)
        if not count:
            # Not possible here, or at the end of the layer: then reading it says so.
            copy_through_buffer(layer, position, stop, target, moved)
            return
        position += count
        moved(count)


def _copy_in_kernel(layer: Layer, position: int, stop: int, target: Target) -> int:
    # Once for each page that lies scattered: a context manager would take as long as the call.
    length = min(stop - position, _KERNEL_CHUNK)
    try:
        return os.copy_file_range(layer.fd, target.fd, length, position, position)
    except OSError as error:
        if error.errno in _NO_KERNEL_COPY:
            return 0
        raise described(error, f"{layer.path} -> {target.path}", target) from error


def copy_through_buffer(
    layer: Layer, start: int, stop: int, target: Target, moved: Callable[[int], None]
) -> None:
    """`copy_range` by reading and writing alone: all of the range is data in the target then.

    The kernel's copy shares blocks where it can, and a hole of the layer's file so stays one.
    """
    buffer = page_aligned(min(stop - start, BLOCK))
    for position in range(start, stop, BLOCK):
        part = buffer[: min(stop - position, BLOCK)]
        with failures(layer.path):
            layer.read_into(part, position)
        with failures(target.path, target):
            write_at(target.fd, part, position)
        moved(len(part))


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` from `offset` on, positionless. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
