"""Moving ranges of layers into a file: sharing blocks, copying, and early writeback."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from operator import length_hint

from diffmergefs.core.errors import NoSpaceError
from diffmergefs.core.failures import Target, described, failures, free_bytes
from diffmergefs.core.identity import limit_read_bits
from diffmergefs.core.layer import Layer
from diffmergefs.core.sparse import BLOCK, page_aligned
from diffmergefs.core.workers import Progress

# The bytes per call: small enough to report progress and handle signals soon.
_KERNEL_CHUNK = 16 * BLOCK

# How much is written before its writeback begins.
_WINDOW = 32 << 20
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None)

_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("=qQQQ")

# Errors that mean only that the kernel cannot share or copy here. ETXTBSY: a swap file.
_NO_CLONE = frozenset(
    {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ETXTBSY},
)
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


def clone_file(layer: Layer, target: Target) -> bool:
    """Share all of the layer's blocks with the target, which has its size; False if impossible.

    Raises FileAccessError and NoSpaceError for every other failure.
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
    """Share the blocks of each segment (start, stop, layer) with the target, in order.

    Returns how many were shared: all, or those before the first that cannot be. Each begins and
    ends on a block of the filesystem, or ends with both files. Raises like `clone_file`.
    """
    pack = _CLONE_RANGE.pack
    requests = [pack(layers[n].fd, start, stop - start, start) for start, stop, n in segments]
    left = iter(requests)
    try:
        # All calls in one C loop: the kernel fills the processor's caches, so after each call a
        # loop in Python would take four times as long. Signals wait for the last call.
        deque(map(fcntl.ioctl, repeat(target.fd), repeat(_FICLONERANGE), left), maxlen=0)
    except OSError as error:
        done = len(requests) - length_hint(left) - 1
        _require_no_clone(error, layers[segments[done][2]], target)
        return done
    return len(requests)


def _require_no_clone(error: OSError, layer: Layer, target: Target) -> None:
    if error.errno not in _NO_CLONE:
        raise described(error, f"{layer.path} -> {target.path}", target) from error


def copy_range(layer: Layer, start: int, stop: int, target: Target, progress: Progress) -> None:
    """Copy `[start, stop)` of the layer to the same range of the target; zeros stay data.

    By copy_file_range(2), and where that is not possible through a buffer of at most `BLOCK` bytes
    and no larger than the range. Nothing is synced and the fingerprint is not compared: call
    `layer.check_unchanged` afterwards. Raises LayerChangedError if the layer ends early,
    FileAccessError, NoSpaceError.
    """
    position = start
    while position < stop:
        count = _copy_in_kernel(layer, position, stop, target)
        if not count:
            # Impossible here, or the layer ends early: then reading reports it.
            copy_through_buffer(layer, position, stop, target, progress)
            return
        position += count
        progress(count)


def _copy_in_kernel(layer: Layer, position: int, stop: int, target: Target) -> int:
    # Called once per scattered page: a context manager would take as long as the call.
    length = min(stop - position, _KERNEL_CHUNK)
    try:
        return os.copy_file_range(layer.fd, target.fd, length, position, position)
    except OSError as error:
        if error.errno in _NO_KERNEL_COPY:
            return 0
        raise described(error, f"{layer.path} -> {target.path}", target) from error


def copy_through_buffer(
    layer: Layer, start: int, stop: int, target: Target, progress: Progress
) -> None:
    """`copy_range` only by reading and writing, so all of the range is data in the target.

    The kernel's copy may share blocks, and then a hole in the layer's file stays a hole.
    """
    buffer = page_aligned(min(stop - start, BLOCK))
    for position in range(start, stop, BLOCK):
        part = buffer[: min(stop - position, BLOCK)]
        with failures(layer.path):
            layer.read_into(part, position)
        with failures(target.path, target):
            write_at(target.fd, part, position)
        progress(len(part))


def output_mode(source: Layer, inputs: Sequence[Layer]) -> int:
    """The mode for a new file: that of `source`, without read bits that another input lacks.

    Raises FileAccessError.
    """
    with failures(source.path):
        return limit_read_bits(source.mode & 0o777, [layer.mode for layer in inputs])


def require_space(target: Target, needed: int) -> None:
    """Raise NoSpaceError if the target's filesystem has less than `needed` bytes free."""
    with failures(target.path):
        free = free_bytes(target.fd)
    if free is not None and free < needed:
        raise NoSpaceError(
            f"{target.path}: {needed} bytes must be written, but {free} are free on its filesystem;"
            " make room or choose another output"
        )


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` from `offset` on, positionless. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


@contextmanager
def early_writeback(fd: int) -> Iterator[Callable[[int], None]]:
    """A callable to call with each offset up to which the file is written, ascending.

    Its thread makes the kernel begin to write those bytes to the disk. By itself the kernel begins
    late, often with the fsync at the end, and the disk idles until then. The fsync must follow: it
    waits for the bytes and takes the file's errors, which sync_file_range(2) with
    SYNC_FILE_RANGE_WRITE alone does neither. It does all the work where there is no such call, or
    no thread can start (pids.max). No thread is left on leaving.
    """
    begun = 0
    thread = ThreadPoolExecutor(1, "writeback")
    can_start = _starts(thread)

    def written(stop: int) -> None:
        nonlocal begun
        if can_start and stop - begun >= _WINDOW:
            thread.submit(_start_writeback, fd, begun, stop)
            begun = stop

    try:
        yield written
    finally:
        thread.shutdown(cancel_futures=True)


def _starts(thread: ThreadPoolExecutor) -> bool:
    # A thread that fails to start later leaves the work for it in its queue.
    try:
        thread.submit(int)
    except RuntimeError:
        return False
    return True


def _start_writeback(fd: int, start: int, stop: int) -> None:
    # This may block while the disk's queue is full, hence the thread.
    offset, count = ctypes.c_int64(start), ctypes.c_int64(stop - start)
    _libc.sync_file_range(fd, offset, count, _SYNC_FILE_RANGE_WRITE)
