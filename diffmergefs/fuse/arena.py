"""A memory file for what is too large for the journal. It outlives the process that writes it.

Everything in it is compressed, because a daemon has it twice: 100,000 extents take 10 ms of one
processor and an eighth of their size.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import threading
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from diffmergefs.core.extents import PAGE
from diffmergefs.system.board import Board

_NUMBER = 8  # the bytes of an offset in an array
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


class Place(NamedTuple):
    """Where something lies in an `Arena`, and its length in bytes."""

    start: int
    length: int


class Arena:
    """Things, pickled, each at its place. No place is used twice. Safe for several threads.

    Make it in the keeper. What a process was writing when it died has no place. `board` has the end
    of the places that were given out. (The size of the file would not do: a thread of a dead server
    may be in the kernel for a while, and change it when a successor has written already.)
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._fd = os.memfd_create("arena")
        self._lock = threading.Lock()

    def put(self, thing: object) -> Place:
        """Keep the thing, and return its place. Raises OSError if there is no memory."""
        data = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
        packed = memoryview(zlib.compress(_by_place(data), 1))
        with self._lock:
            start = self._board["arena"]
            self._board["arena"] = _rounded(start + len(packed))
        at = start
        while packed:
            count = os.pwrite(self._fd, packed, at)
            packed, at = packed[count:], at + count
        return Place(start, at - start)

    def get(self, place: Place) -> Any:
        """The thing at this place."""
        packed = os.pread(self._fd, place.length, place.start)
        return pickle.loads(_in_order(zlib.decompress(packed)))

    def free(self, place: Place) -> None:
        """Give back the memory of a place."""
        self._punch(place.start, _rounded(place.start + place.length))

    def free_all_but(self, places: Iterable[Place]) -> None:
        """Give back all other memory. Nothing may be put in meanwhile."""
        at = 0
        for start, length in sorted(places):
            self._punch(at, start)
            at = _rounded(start + length)
        self._punch(at, self._board["arena"])

    def _punch(self, start: int, stop: int) -> None:
        if start < stop:
            libc = ctypes.CDLL(None)
            arguments = self._fd, _PUNCH_HOLE, ctypes.c_long(start), ctypes.c_long(stop - start)
            libc.fallocate(*arguments)  # if it fails, the memory stays in use


def _by_place(data: bytes) -> bytes:
    # All first bytes of 64-bit integers, then all second ones, and so on. Offsets in order have
    # most of them in common with the next: that halves what they take, and the time.
    return b"".join(data[number::_NUMBER] for number in range(_NUMBER))


def _in_order(data: bytes) -> bytearray:
    # What `_by_place` was given.
    found, at = bytearray(len(data)), 0
    for number in range(_NUMBER):
        count = len(range(number, len(data), _NUMBER))
        found[number::_NUMBER] = data[at : at + count]
        at += count
    return found


def _rounded(size: int) -> int:
    return -(-size // PAGE) * PAGE
