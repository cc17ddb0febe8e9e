"""Marks of the requests in hand, which outlive the server: what ends three in a row is refused."""

from __future__ import annotations

import errno
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from zlib import crc32

import trio

from diffmergefs.core.errors import os_error
from diffmergefs.system.board import Board, Mark

_NONE = 0
_TURN_SECONDS = 1.0

#: A read's mark has one number: the page of its offset in the low 32 bits, which is enough for the
#: largest image, and the image above.
PAGE_BITS = 12
_READ = 1 << 32


def _ignore(mark: Mark) -> None:
    pass


class Marks:
    """The marks on a `board`. A request whose mark is `poisoned` is answered with EIO.

    `clear` is called once for each of the `suspects` of which a request was answered. `numbers` has
    four for each mark. The first of all is for a read that is answered at once: set it there. For
    the event loop only.

    A request that ends each server comes again at once, with all that were in hand beside it. So
    suspects have their turns, one by one: what is in hand at the next death is the guilty one.
    """

    def __init__(
        self,
        board: Board,
        suspects: frozenset[Mark] = frozenset(),
        poisoned: Mapping[Mark, float] | None = None,
        clear: Callable[[Mark], None] = _ignore,
    ) -> None:
        self.numbers = board.marks
        self.is_watchful = bool(suspects or poisoned)
        self._suspects = set(suspects)
        self._poisoned = dict(poisoned or {})
        self._clear = clear
        self._free = list(range(4, len(self.numbers), 4))
        self._turn = trio.Lock()

    def begin(self, *mark: int) -> int:
        """Mark a request; the place to `end` it by. Raises OSError (EIO) if it is poisoned.

        `mark` has four numbers. 0 is the place of a request without a mark, if there are too many.
        """
        self.require_sound(mark)
        if not self._free:
            return _NONE
        place = self._free.pop()
        numbers = self.numbers
        numbers[place + 1], numbers[place + 2], numbers[place + 3] = mark[1:]
        numbers[place] = mark[0]
        return place

    def end(self, place: int) -> None:
        """Take a mark back: its request is answered."""
        if place != _NONE:
            if self.is_watchful:
                self.answered(tuple(self.numbers[place : place + 4]))
            self.numbers[place] = 0
            self._free.append(place)

    @asynccontextmanager
    async def turn(self, mark: Mark) -> AsyncIterator[None]:
        """Wait until no other suspect has its turn, if requests of this mark are suspect.

        But not for long: the storage of the other one may hang.
        """
        if mark not in self._suspects:
            yield
            return
        with trio.move_on_after(_TURN_SECONDS) as waiting:
            await self._turn.acquire()
        try:
            yield
        finally:
            if not waiting.cancelled_caught:
                self._turn.release()

    def require_sound(self, mark: Mark) -> None:
        """Raise OSError (EIO) if requests of this mark are refused now."""
        if mark in self._poisoned and time.monotonic() < self._poisoned[mark]:
            raise os_error(errno.EIO, "a request that ended three servers")

    def answered(self, mark: Mark) -> None:
        """A request of this mark was answered."""
        if mark in self._suspects:
            self._suspects.discard(mark)
            self._clear(mark)
            self.is_watchful = bool(self._suspects or self._poisoned)


def mark_of_reads(inode: int) -> int:
    """The mark of reads of the first page of this image; add the page for others."""
    return (inode & 0x7FFFFFFF) << 33 | _READ


def number_of(part: object) -> int:
    """The number that stands for an argument of a request in its mark."""
    if isinstance(part, bytes):
        return crc32(part)
    return part & 0xFFFFFFFFFFFFFFFF if isinstance(part, int) else 0
