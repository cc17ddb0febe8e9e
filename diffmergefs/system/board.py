"""Memory that a keeper shares with its servers."""

from __future__ import annotations

import mmap

#: What is asked, and three numbers of what it is asked of.
Mark = tuple[int, ...]


class Board:
    """A page of numbers that the keeper and all of its servers share.

    `marks` are four numbers for each request in hand: what is asked, then of what. A first number
    of 0 is a free mark.
    """

    MARKS = 256
    _FIELDS = ("journal", "arena", "beat", "is_known", "is_ready", "longest_ns")

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, 8 * (len(self._FIELDS) + 4 * self.MARKS))
        numbers = memoryview(self._page).cast("Q")
        self.numbers = numbers[: len(self._FIELDS)]
        self.marks = numbers[len(self._FIELDS) :]

    def __getitem__(self, name: str) -> int:
        return self.numbers[self._FIELDS.index(name)]

    def __setitem__(self, name: str, value: int) -> None:
        self.numbers[self._FIELDS.index(name)] = value

    def in_hand(self) -> frozenset[Mark]:
        """The requests in hand."""
        marks = self.marks.tolist()
        found = (tuple(marks[n : n + 4]) for n in range(0, len(marks), 4))
        return frozenset(mark for mark in found if mark[0])

    def clear(self) -> None:
        """Forget all requests in hand."""
        for number in range(0, len(self.marks), 4):
            self.marks[number] = 0
