"""What the kernel has of a file in its page cache; asking for it brings nothing in."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from tests.support.images import PAGE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def resident(file: Path | int) -> set[int]:
    """The numbers of the file's pages that are in the page cache (mincore).

    A path is opened for the moment, which a mount may take for a client's open.
    """
    fd = file if isinstance(file, int) else os.open(file, os.O_RDONLY)
    try:
        return _resident(fd)
    finally:
        if fd is not file:
            os.close(fd)


def _resident(fd: int) -> set[int]:
    size = os.fstat(fd).st_size
    states = ctypes.create_string_buffer(-(-size // PAGE))
    # Private and writable, so that ctypes gives its address; nothing is written.
    with mmap.mmap(fd, size, mmap.MAP_PRIVATE) as view:
        anchor = ctypes.c_char.from_buffer(view)
        done = _libc.mincore(ctypes.addressof(anchor), size, states)
        del anchor
    if done != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return {number for number, state in enumerate(states.raw[: -(-size // PAGE)]) if state & 1}


def evict(fd: int, start: int = 0, length: int = 0) -> None:
    """Have the kernel drop a range's clean pages; by default all of the file's."""
    os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
