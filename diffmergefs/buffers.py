"""Buffers that replies are read into, used again and again: a fresh one costs its page faults."""

from __future__ import annotations

# The most that the kernel asks for at once, unless its administrator raised that.
LARGEST = 1 << 20
_KEPT = 8


class Buffers:
    """Buffers of any size, of which those of up to 1 MiB are used again. For one thread.

    Their contents are whatever was left there.
    """

    def __init__(self) -> None:
        self._shared = memoryview(bytearray(LARGEST))
        self._idle: list[memoryview] = []

    def shared(self, size: int) -> memoryview:
        """The one buffer that everybody shares, `size` bytes of it: good until the next call."""
        return self._shared[:size] if size <= LARGEST else memoryview(bytearray(size))

    def take(self, size: int) -> memoryview:
        """A buffer of `size` bytes that nobody else has until `give_back`."""
        if size > LARGEST:
            return memoryview(bytearray(size))
        # Pages that were never written to take no memory, however large the buffer.
        whole = self._idle.pop() if self._idle else memoryview(bytearray(LARGEST))
        return whole[:size]

    def give_back(self, buffer: memoryview) -> None:
        """Let a buffer that was taken be used again; some are kept, the others are freed."""
        whole = memoryview(buffer.obj)
        if len(whole) == LARGEST and len(self._idle) < _KEPT:
            self._idle.append(whole)
