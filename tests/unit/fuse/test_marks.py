"""Requests in hand are on the board, and poisoned ones are refused."""

from __future__ import annotations

import errno
import time

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from diffmergefs.core.layer import MAX_SIZE
from diffmergefs.fuse.marks import PAGE_BITS, Marks, mark_of_reads, number_of
from diffmergefs.system.board import Board, Mark

READ = 5
FOUR = (READ, 1, 2, 3)
LARGEST = 2**64 - 1


def test_a_request_is_on_the_board_while_it_is_in_hand() -> None:
    board = Board()
    marks = Marks(board)
    places = [marks.begin(READ, n, 2, LARGEST) for n in (1, 2, 1)]
    assert 0 not in places and len(set(places)) == 3
    assert board.in_hand() == {(READ, 1, 2, LARGEST), (READ, 2, 2, LARGEST)}
    marks.end(places[0])
    assert board.in_hand() == {(READ, 1, 2, LARGEST), (READ, 2, 2, LARGEST)}
    marks.end(places[2])
    assert board.in_hand() == {(READ, 2, 2, LARGEST)}
    marks.end(places[1])
    assert board.in_hand() == frozenset()


def test_mark_0_is_for_reads_that_are_answered_at_once() -> None:
    board = Board()
    marks = Marks(board)
    marks.numbers[0:4] = memoryview(b"".join(n.to_bytes(8, "little") for n in FOUR)).cast("Q")
    assert board.in_hand() == {FOUR}
    assert marks.begin(READ, 9, 9, 9) != 0
    marks.end(0)
    assert board.in_hand() == {FOUR, (READ, 9, 9, 9)}


def test_a_poisoned_request_gets_an_error_and_no_mark_until_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board, now = Board(), 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    marks = Marks(board, poisoned={FOUR: 200.0})
    assert marks.is_watchful
    for ask in (lambda: marks.begin(*FOUR), lambda: marks.require_sound(FOUR)):
        with pytest.raises(OSError) as caught:
            ask()
        assert caught.value.errno == errno.EIO
    assert board.in_hand() == frozenset()
    marks.require_sound((READ, 1, 2, 4))
    marks.begin(READ, 1, 2, 4)
    assert board.in_hand() == {(READ, 1, 2, 4)}
    now = 200.0
    marks.require_sound(FOUR)
    marks.begin(*FOUR)
    assert board.in_hand() == {(READ, 1, 2, 4), FOUR}


def test_a_suspect_is_cleared_once_when_it_was_answered() -> None:
    cleared: list[Mark] = []
    other = (READ, 9, 9, 9)
    marks = Marks(Board(), frozenset({FOUR, other}), clear=cleared.append)
    assert marks.is_watchful
    places = [marks.begin(*each) for each in (FOUR, (READ, 5, 5, 5), FOUR)]
    assert not cleared
    for place in places:
        marks.end(place)
    assert cleared == [FOUR]
    assert marks.is_watchful
    for _ in range(2):
        marks.answered(other)
        assert cleared == [FOUR, other]
    assert not marks.is_watchful, "nothing is left to look for"


def test_without_suspects_and_poison_nothing_need_be_watched() -> None:
    assert not Marks(Board()).is_watchful


def test_requests_that_are_too_many_have_no_mark_and_are_answered() -> None:
    board = Board()
    marks = Marks(board)
    places = [marks.begin(READ, n, 0, 0) for n in range(Board.MARKS + 10)]
    assert places[-11:] == [0] * 11 and 0 not in places[:-11]
    for place in places[-11:]:
        marks.end(place)
    assert len(board.in_hand()) == Board.MARKS - 1
    marks.end(places[5])
    assert marks.begin(READ, 7, 7, 7) == places[5]


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, LARGEST)] * 4), max_size=20), st.data())
def test_the_board_has_just_what_has_not_ended(
    requests: list[tuple[int, ...]], draws: st.DataObject
) -> None:
    board = Board()
    marks = Marks(board)
    placed = [(marks.begin(*each), each) for each in requests]
    numbers = st.sampled_from(range(len(placed))) if placed else st.nothing()
    ended = draws.draw(st.sets(numbers))
    for number in ended:
        marks.end(placed[number][0])
    left = {each for number, (_, each) in enumerate(placed) if number not in ended}
    assert board.in_hand() == left


def test_each_argument_of_a_request_has_a_number() -> None:
    assert number_of(5) == 5
    assert number_of(2**64 + 5) == 5
    assert 0 <= number_of(-1) <= LARGEST
    assert number_of(b"name") == number_of(b"name") != number_of(b"other")
    assert number_of(None) == number_of(object()) == 0


PAGES = st.integers(0, MAX_SIZE - 1).map(lambda offset: offset >> PAGE_BITS)


@settings(deadline=None)
@given(
    st.integers(1, 2**31 - 1), PAGES, st.integers(1, 2**31 - 1), PAGES, st.integers(0, 2**32 - 1)
)
def test_reads_of_one_page_of_one_image_have_one_mark(
    inode: int, page: int, other_inode: int, other_page: int, other_kind: int
) -> None:
    mark, other = mark_of_reads(inode) + page, mark_of_reads(other_inode) + other_page
    assert (mark == other) == ((inode, page) == (other_inode, other_page))
    assert mark == mark_of_reads(inode) | page and 0 < mark <= LARGEST
    assert mark != other_kind, "no other request begins with it"


# Turns


def test_suspects_have_their_turns_one_by_one_and_others_need_not_wait() -> None:
    suspects = {(READ, n, 0, 0) for n in range(3)}
    marks = Marks(Board(), frozenset(suspects))
    under_way: list[Mark] = []
    most = {"suspects": 0, "others": 0}

    async def ask(mark: Mark, kind: str) -> None:
        async with marks.turn(mark):
            under_way.append(mark)
            found = [each for each in under_way if (each in suspects) == (kind == "suspects")]
            most[kind] = max(most[kind], len(found))
            await trio.sleep(0.01)
            under_way.remove(mark)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for mark in sorted(suspects):
                nursery.start_soon(ask, mark, "suspects")
            for n in range(3):
                nursery.start_soon(ask, (READ, 10 + n, 0, 0), "others")

    trio.run(main)
    assert most == {"suspects": 1, "others": 3}


def test_a_suspect_that_hangs_does_not_hold_the_others_up(autojump_clock: MockClock) -> None:
    first, second = (READ, 1, 0, 0), (READ, 2, 0, 0)
    marks = Marks(Board(), frozenset({first, second}))
    done: list[Mark] = []

    async def hang() -> None:
        async with marks.turn(first):
            await trio.sleep_forever()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang)
            await trio.testing.wait_all_tasks_blocked()
            async with marks.turn(second):
                done.append(second)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=autojump_clock)
    assert done == [second]


@pytest.fixture
def autojump_clock() -> MockClock:
    """A clock on which no wait takes time."""
    return MockClock(autojump_threshold=0)
