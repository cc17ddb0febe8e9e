"""A journal in memory that outlives the process which writes it."""

from __future__ import annotations

import os
import pickle
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from zlib import crc32

from diffmergefs.system.board import Board

Record = tuple[Any, ...]

_HEAD = struct.Struct("<II")  # the length of what follows, and its checksum
SLACK = 1 << 20  # how many bytes out of date are not worth a new journal


class Journal:
    """Records in one of two memory files, of which `board` says which one is in force.

    Make it in the keeper. `append` is safe for several threads.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._files = [os.memfd_create(f"journal-{n}") for n in (0, 1)]
        self._lock = threading.Lock()
        self._size = self._least = 0

    def read(self) -> Iterator[Record]:
        """The records, up to the first that is torn: the process was killed while it wrote that."""
        text = _content(self._files[self._board["journal"]])
        at = 0
        while at + _HEAD.size <= len(text):
            length, checksum = _HEAD.unpack_from(text, at)
            packed = text[at + _HEAD.size : at + _HEAD.size + length]
            if len(packed) < length or crc32(packed) != checksum:
                return
            yield from pickle.loads(packed)
            at += _HEAD.size + length

    def append(self, *records: Record) -> None:
        """Add these records; after the return they outlive this process, and before none does."""
        packed = _packed(records)
        with self._lock:
            self._write(packed)

    def begin(self, records: Callable[[], Iterable[Record]]) -> None:
        """Put a new journal of these records in force in place of the old one.

        `records` is called while no thread can append. A process that is killed meanwhile leaves
        the old journal in force.
        """
        with self._lock:
            packed = _packed(records())
            number = 1 - self._board["journal"]
            os.ftruncate(self._files[number], 0)
            self._size = 0
            self._write(packed, number)
            self._least = self._size
            self._board["journal"] = number

    @property
    def is_long(self) -> bool:
        """Whether most of its records are probably out of date."""
        return self._size > 4 * self._least + SLACK

    def _write(self, packed: bytes, number: int | None = None) -> None:
        fd = self._files[self._board["journal"] if number is None else number]
        view = memoryview(packed)
        while view:
            count = os.pwrite(fd, view, self._size)
            self._size += count
            view = view[count:]


def _packed(records: Iterable[Record]) -> bytes:
    packed = pickle.dumps(tuple(records), pickle.HIGHEST_PROTOCOL)
    return _HEAD.pack(len(packed), crc32(packed)) + packed


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)
