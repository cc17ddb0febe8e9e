"""Moving a range of a layer into a file: shared if the filesystem can, copied otherwise."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import length_hint
from typing import NamedTuple

from diffmergefs.core.buffers import page_aligned
from diffmergefs.core.errors import DiffMergeError, FileAccessError, NoSpaceError
from diffmergefs.core.layer import Layer

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

    A tmpfs without a limit, and some FUSE filesystems, report zero blocks in all; other FUSE
    servers cannot be asked.
    """
    status = _statvfs(fd)
    return status.f_bavail * status.f_frsize if status and status.f_blocks else None


def block_size(fd: int) -> int:
    """The unit in bytes in which the filesystem of the file `fd` stores, and may share, blocks."""
    status = _statvfs(fd)
    return status.f_frsize if status else os.fstat(fd).st_blksize


def _statvfs(fd: int) -> os.statvfs_result | None:
    try:
        return os.fstatvfs(fd)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return None


def clone_file(layer: Layer, target: Target) -> bool:
    """Share all of the layer's blocks with the target, which has its size; False if impossible.

    Raises FileAccessError and NoSpaceError for any other failure.
    """
    try:
        fcntl.ioctl(target.fd, _FICLONE, layer.fd)
    except OSError as error:
        _require_no_clone(error, layer, target)
        return False
    return True


def clone_ranges(
    layers: Sequence[Layer], segments: Sequence[tuple[int, int, int]], target: Target
) -> int:
    """Share the blocks of each segment (start, stop, layer) with the target's, in their order.

    How many are shared: all, or those before the first that cannot be. Each begins and ends on a
    block of the filesystem, or ends with both files. Raises like `clone_file`.
    """
    pack = _CLONE_RANGE.pack
    requests = [pack(layers[n].fd, start, stop - start, start) for start, stop, n in segments]
    left = iter(requests)
    try:
        # All calls in one: after each of them, with the caches full of the kernel's, a loop in
        # Python takes four times as long as it does alone. Signals wait for the last one.
        deque(map(fcntl.ioctl, repeat(target.fd), repeat(_FICLONERANGE), left), maxlen=0)
    except OSError as error:
        done = len(requests) - length_hint(left) - 1
        _require_no_clone(error, layers[segments[done][2]], target)
        return done
    return len(requests)


def _require_no_clone(error: OSError, layer: Layer, target: Target) -> None:
    if error.errno not in _NO_CLONE:
        raise described(error, f"{layer.path} -> {target.path}", target) from error


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
