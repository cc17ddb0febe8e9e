"""The numbers that a keeper and its servers share."""

from __future__ import annotations

import os

from diffmergefs.system.board import Board
from tests.support.forks import fork
from tests.support.subjects.keeper import put_marks

MARK, OTHER = (7, 1, 2, 3), (8, 1, 2, 2**64 - 1)


def test_the_requests_in_hand_are_the_marks_that_are_not_free() -> None:
    board = Board()
    assert board.in_hand() == frozenset()
    put_marks(board, MARK, OTHER, (0, 5, 5, 5), MARK)
    assert board.in_hand() == {MARK, OTHER}
    assert len(board.marks) == 4 * Board.MARKS


def test_clearing_forgets_the_requests_and_nothing_else() -> None:
    board = Board()
    put_marks(board, *[MARK] * Board.MARKS)
    board["beat"], board["longest_ns"] = 2**64 - 1, 3
    board.clear()
    assert board.in_hand() == frozenset()
    assert (board["beat"], board["longest_ns"], board["journal"]) == (2**64 - 1, 3, 0)


def test_what_a_killed_process_wrote_is_there() -> None:
    board = Board()
    child = fork()
    if child == 0:
        board["journal"] = 5
        put_marks(board, MARK)
        os._exit(9)
    os.waitpid(child, 0)
    assert board["journal"] == 5 and board.in_hand() == {MARK}
