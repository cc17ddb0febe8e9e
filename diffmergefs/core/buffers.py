"""The unit of reading and copying, and page-aligned buffers of that size that are used again."""

from __future__ import annotations

import mmap

#: How many bytes are read, copied or compared at a time. Also the most that the kernel requests
#: of a FUSE mount at once, unless its administrator raised the limit.
BLOCK = 1 << 20

#: A block of zeros.
ZEROS = bytes(BLOCK)

_KEPT = 8


def page_aligned(size: int) -> memoryview:
    """A writable buffer of `size` bytes, at least one, of zeros; it begins on a page of memory.

    A large bytearray begins 16 bytes into one. Some processors copy six times slower to there from
    a page of the page cache: AMD's EPYC, preadv of 1 MiB, 1.6 GiB/s against 10.8 (seen with every
    other offset that was tried, 32 to 4080). Freed with its last reference.
    """
    return memoryview(mmap.mmap(-1, size))[:size]


class Buffers:
    """Buffers of any size, of which those of up to 1 MiB are used again. For one thread.

    Their contents are whatever was left there.
    """

    def __init__(self) -> None:
        self._shared = page_aligned(BLOCK)
        self._idle: list[memoryview] = []

    def shared(self, size: int) -> memoryview:
        """The one buffer that everybody shares, `size` bytes of it: good until the next call."""
        return self._shared[:size] if size <= BLOCK else page_aligned(size)

    def take(self, size: int) -> memoryview:
        """A buffer of `size` bytes that nobody else has until `give_back`."""
        if size > BLOCK:
            return page_aligned(size)
        # Pages that were never written to take no memory, however large the buffer.
        whole = self._idle.pop() if self._idle else page_aligned(BLOCK)
        return whole[:size]

    def give_back(self, buffer: memoryview) -> None:
        """Let a buffer that was taken be used again; some are kept, the others are freed."""
        whole = memoryview(buffer.obj)
        if len(whole) == BLOCK and len(self._idle) < _KEPT:
            self._idle.append(whole)
