"""A journal is read up to where a kill tore it, and another one takes its place in one step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.fuse import journal as module
from diffmergefs.fuse.journal import Journal, Record
from diffmergefs.system.board import Board
from tests.support.forks import fork

VALUES = st.recursive(
    st.one_of(st.integers(), st.binary(max_size=40), st.text(max_size=20), st.none()),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)
RECORDS = st.lists(st.lists(VALUES.map(lambda value: ("record", value)), max_size=3), max_size=5)


def file_of(journal: Journal, board: Board) -> int:
    return journal._files[board["journal"]]


def text_of(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def close(journal: Journal) -> None:
    for fd in journal._files:
        os.close(fd)


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def journal(board: Board) -> Iterator[Journal]:
    found = Journal(board)
    yield found
    close(found)


def killed_in(work: Any, *, after: int = 0) -> None:
    """Do this in a child that is killed at its next write but `after`."""
    child = fork()
    if child == 0:
        pwrite = os.pwrite
        left = after

        def dies(fd: int, text: bytes, at: int) -> int:
            nonlocal left
            if left == 0:
                pwrite(fd, bytes(text)[: len(text) // 2], at)
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return pwrite(fd, text, at)

        try:
            os.pwrite = dies  # type: ignore[assignment]
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@settings(deadline=None, max_examples=10)
@given(RECORDS)
def test_every_torn_journal_reads_as_the_records_before_the_tear(batches: list[list[Any]]) -> None:
    board = Board()
    journal = Journal(board)
    try:
        ends = [0]
        for batch in batches:
            journal.append(*batch)
            ends.append(os.fstat(file_of(journal, board)).st_size)
        assert list(journal.read()) == [record for batch in batches for record in batch]
        text = text_of(file_of(journal, board))
        for length in range(len(text) + 1):
            os.ftruncate(file_of(journal, board), length)
            whole = sum(end <= length for end in ends[1:])
            assert list(journal.read()) == [r for batch in batches[:whole] for r in batch]
            os.pwrite(file_of(journal, board), text, 0)
    finally:
        close(journal)


@settings(deadline=None)
@given(st.data())
def test_a_record_that_is_not_whole_is_none_whatever_its_bytes_are(draws: st.DataObject) -> None:
    """A write may have got only some of its pages to the file: the others are zeros."""
    board = Board()
    journal = Journal(board)
    try:
        journal.append(("first", 1))
        start = os.fstat(file_of(journal, board)).st_size
        journal.append(("second", b"x" * 100))
        text = bytearray(text_of(file_of(journal, board)))
        at = draws.draw(st.integers(start + 4, len(text) - 1))
        text[at] ^= draws.draw(st.integers(1, 255))
        os.pwrite(file_of(journal, board), text, 0)
        assert list(journal.read()) == [("first", 1)]
    finally:
        close(journal)


def test_an_append_that_a_kill_tears_is_as_if_it_never_was_made(
    journal: Journal, board: Board
) -> None:
    journal.begin(lambda: [("first", 1)])
    killed_in(lambda: journal.append(("torn", b"x" * 1000)))
    assert list(journal.read()) == [("first", 1)]
    # The next process begins anew, so nothing follows what is torn.
    found = list(journal.read())
    journal.begin(lambda: found)
    journal.append(("second", 2))
    assert list(journal.read()) == [("first", 1), ("second", 2)]


def test_several_records_of_one_append_are_there_together_or_not(
    journal: Journal, board: Board
) -> None:
    journal.append(("a", 1), ("b", 2))
    size = os.fstat(file_of(journal, board)).st_size
    os.ftruncate(file_of(journal, board), size - 1)
    assert list(journal.read()) == []


def test_an_append_outlives_the_process_that_made_it(journal: Journal) -> None:
    child = fork()
    if child == 0:
        journal.append(("from", "the child"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert list(journal.read()) == [("from", "the child")]


@pytest.mark.parametrize("died_before", [0, 1])
def test_the_old_journal_is_in_force_until_the_new_one_is_whole(
    died_before: int, journal: Journal, board: Board
) -> None:
    for _ in range(died_before):
        journal.begin(lambda: [("older", 0)])
    journal.append(("old", 1))
    before = list(journal.read())
    in_force = board["journal"]
    killed_in(lambda: journal.begin(lambda: [("new", b"x" * 10_000)] * 3))
    assert board["journal"] == in_force and list(journal.read()) == before

    def fails() -> Iterable[Record]:
        yield ("new", 1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        journal.begin(fails)
    assert list(journal.read()) == before
    journal.append(("old", 2))
    assert list(journal.read()) == [*before, ("old", 2)]
    journal.begin(lambda: [("new", 1)])
    assert list(journal.read()) == [("new", 1)] and board["journal"] != in_force
    journal.append(("new", 2))
    assert list(journal.read()) == [("new", 1), ("new", 2)]


def test_a_new_journal_is_shorter_however_long_the_one_before_last_was(journal: Journal) -> None:
    journal.append(("x", b"x" * 100_000))
    for n in range(4):
        journal.begin(lambda n=n: [("n", n)])  # type: ignore[misc]
        assert list(journal.read()) == [("n", n)]


def test_threads_append_side_by_side(journal: Journal) -> None:
    def append(thread: int) -> None:
        for n in range(100):
            journal.append((thread, n))

    threads = [threading.Thread(target=append, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = list(journal.read())
    assert sorted(found) == [(thread, n) for thread in range(8) for n in range(100)]
    for number in range(8):
        assert [n for t, n in found if t == number] == list(range(100))


def test_nothing_is_appended_while_another_journal_takes_its_place(journal: Journal) -> None:
    """It would be in neither."""
    appended = threading.Event()

    def append() -> None:
        journal.append(("late", 2))
        appended.set()

    thread = threading.Thread(target=append)

    def records() -> list[Record]:
        thread.start()
        assert not appended.wait(0.1)
        return [("new", 1)]

    journal.begin(records)
    thread.join()
    assert list(journal.read()) == [("new", 1), ("late", 2)]


def test_a_short_write_is_continued(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, text, at: pwrite(fd, bytes(text)[:7], at))
    journal.append(("x", b"y" * 1000))
    assert list(journal.read()) == [("x", b"y" * 1000)]


def test_it_is_long_once_it_has_grown_far_beyond_its_beginning(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLACK", 1000)
    journal.begin(lambda: [("x", b"x" * 1000)])
    assert not journal.is_long
    for _ in range(3):
        journal.append(("x", b"x" * 1000))
    assert not journal.is_long
    for _ in range(3):
        journal.append(("x", b"x" * 1000))
    assert journal.is_long
    journal.begin(lambda: [("x", b"x" * 5000)])
    assert not journal.is_long
