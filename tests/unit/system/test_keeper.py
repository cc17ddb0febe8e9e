"""A keeper, its servers, and what one of them leaves to the next."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from diffmergefs.system import keeper
from diffmergefs.system.board import Mark
from diffmergefs.system.line import Line
from tests.support.live import until
from tests.support.subjects.keeper import Say, die, keeping, outcome, put_marks, signal_of

FOREVER = 10**9
_EXIT = {"x86_64": 60}.get(os.uname().machine, 93)


@pytest.fixture(autouse=True)
def without_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deaths count for as long as a test lasts."""
    monkeypatch.setattr(keeper, "WITHIN_SECONDS", FOREVER)


# Servers, one after another


def test_the_word_of_a_server_is_the_end() -> None:
    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        return b"it has ended"

    assert outcome(serve) == [["over", "it has ended", 1, "it ended with status 0"]]


def test_the_mount_is_ready_once() -> None:
    def serve(line: Line, say: Say) -> bytes:
        if line.number > 1:
            line.ready()
        say(line.number)
        if line.number < 4:
            die()
        return b""

    with keeping(serve) as kept:
        said = kept.rest()
    assert said[0] == 1 and sorted(map(str, said[:5])) == ["1", "2", "3", "4", "ready"]


def test_however_a_server_ends_the_next_follows_and_knows_how_it_ended() -> None:
    def serve(line: Line, say: Say) -> bytes:
        say([line.number, line.reason])
        line.ready()
        match line.number:
            case 1:
                os._exit(3)
            case 2:
                raise ZeroDivisionError
            case 3:
                sys.exit(4)
            case 4:
                die()
            case 5:
                die(signal.SIGUSR1)
        return b"done"

    assert outcome(serve) == [
        [1, ""],
        [2, "it ended with status 3"],
        [3, "it ended with status 70"],
        [4, "it ended with status 70"],
        [5, "it was killed by SIGKILL"],
        [6, "it was killed by SIGUSR1"],
        ["over", "done", 6, "it ended with status 0"],
    ]


def test_a_server_that_raises_has_it_in_the_log() -> None:
    def serve(line: Line, say: Say) -> bytes:
        class Saying(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                say([record.getMessage(), bool(record.exc_info)])

        if line.number > 1:
            return b""
        keeper.log.addHandler(Saying())
        raise ZeroDivisionError

    assert ["the server failed: this is a bug", True] in outcome(serve)


def test_a_leader_that_has_ended_is_dead_whatever_its_threads_do() -> None:
    """A thread may hang in the kernel. Nobody waits for it."""

    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        if line.number == 1:
            say(os.getpid())
            line.board["journal"] = os.getpid()
            threading.Thread(target=time.sleep, args=(600,)).start()
            ctypes.CDLL(None).syscall(_EXIT, 0)  # of this thread alone
        first = line.board["journal"]
        if line.number == 2:
            say([line.reason, has_ended(first)])
            os.kill(first, signal.SIGKILL)
            until(lambda: len(os.listdir(f"/proc/{first}/task")) == 1, "its thread lives")
            die()
        until(lambda: has_ended(first), "nobody reaped it")
        return b"done"

    def has_ended(process: int) -> bool:
        return not os.path.exists(f"/proc/{process}")

    assert outcome(serve)[1:] == [
        ["it was killed, and a thread of it still waits for storage or for a page", False],
        ["over", "done", 3, "it ended with status 0"],
    ]


# A server that does nothing


def test_a_server_that_is_silent_is_replaced() -> None:
    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        if line.number == 1:
            die(signal.SIGSTOP)
        say(line.reason)
        return b"done"

    assert outcome(serve, watchdog=0.2)[0] == "it did nothing for too long"


def test_a_server_that_hangs_leaves_a_traceback_to_the_next_one() -> None:
    def hangs_here() -> None:
        while True:
            time.sleep(1)

    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        if line.number == 1:
            hangs_here()
        say([line.reason, "in hangs_here" in line.dump])
        if line.number == 2:
            die()
        return b"done"

    said = outcome(serve, watchdog=0.2)
    assert said[0] == ["it did nothing for too long", True]
    assert said[1] == ["it was killed by SIGKILL", False]


def test_a_server_that_beats_is_left_alone_and_without_a_watchdog_a_silent_one_too() -> None:
    def beats(line: Line, say: Say) -> bytes:
        for _ in range(40):
            line.board["beat"] += 1
            time.sleep(0.05)
        return b"done"

    def is_silent(line: Line, say: Say) -> bytes:
        time.sleep(1)
        return b"done"

    for serve, watchdog in ((beats, 1.0), (is_silent, 0)):
        assert outcome(serve, watchdog=watchdog) == [["over", "done", 1, "it ended with status 0"]]


def test_the_kernel_prefers_to_kill_the_server() -> None:
    def serve(line: Line, say: Say) -> bytes:
        for process in (line.keeper, os.getpid()):
            with open(f"/proc/{process}/oom_score_adj") as file:
                say(int(file.read()))
        return b""

    kept, server = outcome(serve)[:2]
    assert server > kept or server == 1000


# Short of memory


@pytest.mark.parametrize("name", ["fork", "pidfd_open"])
def test_a_server_that_cannot_be_started_is_tried_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = getattr(os, name), [True, False, True, True, False]

    def sometimes(*arguments: Any) -> Any:
        if os.getpid() != process and fails.pop(0):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real(*arguments)

    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        say(line.number)
        if line.number == 1:
            die()
        return b"done"

    process = os.getpid()
    monkeypatch.setattr(os, name, sometimes)
    said = outcome(serve)
    assert said[:2] == [1, 2] and said[2][:2] == ["over", "done"]


def test_servers_that_cannot_be_started_at_all_end_the_mount(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, process = os.fork, os.getpid()

    def fails() -> int:
        if os.getpid() == process:
            return real()
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "fork", fails)
    monkeypatch.setattr(keeper, "_START_SECONDS", 0.1)
    reason = "no other can be started: Cannot allocate memory"
    assert outcome(lambda line, say: b"") == ["end", ["over", None, 0, reason]]


# Its end


def test_the_mount_does_not_begin_if_its_first_servers_die() -> None:
    def serve(line: Line, say: Say) -> bytes:
        os._exit(9)

    assert outcome(serve) == ["end", ["over", None, keeper.MOST_AT_START, "it ended with status 9"]]


def test_servers_that_never_answer_end_the_mount() -> None:
    def serve(line: Line, say: Say) -> bytes:
        if line.number in (1, 5):
            line.ready()
        os._exit(9)

    started = 5 + keeper.MOST_DEATHS_UNREADY
    expected = ["end", ["over", None, started, "it ended with status 9"]]
    assert outcome(serve) == expected


@pytest.mark.parametrize("soon", [True, False])
def test_servers_that_die_again_and_again_end_the_mount_if_they_do_so_soon(
    soon: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not soon:
        monkeypatch.setattr(keeper, "WITHIN_SECONDS", 0)

    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        if line.number <= keeper.MOST_DEATHS + 2:
            os._exit(9)
        return b"done"

    said = outcome(serve)
    if soon:
        ending = ["over", None, keeper.MOST_DEATHS, "it ended with status 9"]
        assert said == ["end", ending]
    else:
        assert said[-1][:3] == ["over", "done", keeper.MOST_DEATHS + 3]


def test_a_keeper_that_covers_nothing_ends_the_mount_with_its_server() -> None:
    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        die()
        return b""

    ending = ["over", None, 1, "it was killed by SIGKILL"]
    assert outcome(serve, covers=False) == ["end", ending]


def test_after_the_second_signal_no_server_follows() -> None:
    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(line.keeper, number)
            say(signal_of(line) == number)
        die()
        return b""

    ending = ["over", None, 1, "it was killed by SIGKILL"]
    assert sorted(outcome(serve), key=str) == sorted([True, True, "end", ending], key=str)


# Poison

MARK, OTHER = (7, 1, 2, 3), (8, 1, 2, 2**64 - 1)
Server = Callable[[Line], object]


def in_hand(*marks: Mark, die: Server = lambda _: os._exit(3)) -> Server:
    """A server that ends with these requests in hand."""

    def serve(line: Line) -> None:
        put_marks(line.board, *marks)
        die(line)

    return serve


def answered(*marks: Mark) -> Server:
    """A server that answers requests of these marks, and is killed then."""

    def serve(line: Line) -> None:
        for mark in marks:
            line.clear(mark)
        die()

    return serve


@pytest.mark.parametrize(
    ("servers", "suspects", "poisoned"),
    [
        ([in_hand(MARK, OTHER)], [MARK, OTHER], []),
        ([in_hand(MARK)] * 2, [MARK], []),
        ([in_hand(MARK, OTHER), in_hand(MARK), in_hand(OTHER, MARK)], [OTHER], [MARK]),
        ([in_hand(MARK, OTHER)] * 3, [], [MARK, OTHER]),
        ([in_hand(MARK), in_hand(MARK), in_hand(OTHER), in_hand(MARK)], [OTHER], [MARK]),
        ([in_hand(MARK), in_hand(MARK), answered(MARK), in_hand(MARK)], [MARK], []),
        ([in_hand(MARK), in_hand(MARK), answered(OTHER), in_hand(MARK)], [], [MARK]),
        ([in_hand(MARK)] * 4, [MARK], [MARK]),
        ([in_hand(MARK, die=lambda _: die(signal.SIGUSR1))] * 3, [], [MARK]),
        ([in_hand(MARK, die=lambda _: die())] * 3, [], []),
    ],
    ids=[
        "one death",
        "two deaths",
        "three deaths",
        "both",
        "others between",
        "answered between",
        "another answered",
        "refused, and asked again",
        "crashes",
        "kills from outside",
    ],
)
def test_what_was_in_hand_at_three_deaths_and_was_not_answered_between_is_poison(
    servers: Sequence[Server],
    suspects: list[Mark],
    poisoned: list[Mark],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper, "oom_kills", lambda: "none")
    assert suspicion_after(servers) == [sorted(suspects), sorted(poisoned), True]


def suspicion_after(servers: Sequence[Server]) -> object:
    """The suspects and what is poisoned after servers like these; whether it is so for a while."""

    def serve(line: Line, say: Say) -> bytes:
        assert not line.board.in_hand()
        line.ready()
        if line.number <= len(servers):
            servers[line.number - 1](line)
        soon = time.monotonic() + keeper.POISON_SECONDS
        is_soon = all(soon - 60 < end <= soon for end in line.poisoned.values())
        say([sorted(line.suspects), sorted(line.poisoned), is_soon])
        return b""

    first, poisoned, is_soon = outcome(serve)[0]
    return [[*map(tuple, first)], [*map(tuple, poisoned)], is_soon]


def test_a_kill_because_memory_was_short_is_one_of_the_servers_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kills = iter(range(1000))
    monkeypatch.setattr(keeper, "oom_kills", lambda: f"oom_kill {next(kills)}")
    found = suspicion_after([in_hand(MARK, die=lambda _: die())] * 3)
    assert found == [[], [MARK], True]


def test_a_server_that_is_replaced_ended_by_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "POISON_DEATHS", 1)

    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        if line.number == 1:
            put_marks(line.board, MARK)
            die(signal.SIGSTOP)
        say(sorted(line.poisoned))
        return b""

    assert outcome(serve, watchdog=0.2)[0] == [[*MARK]]


def test_poison_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "POISON_SECONDS", 0)
    assert suspicion_after([in_hand(MARK)] * 3 + [in_hand()]) == [[], [], True]


def test_only_so_many_are_suspects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_MOST_SUSPECTS", 2)
    servers = [in_hand((n, 1, 1, 1)) for n in (1, 2, 3)]
    assert suspicion_after(servers) == [[(2, 1, 1, 1), (3, 1, 1, 1)], [], True]


# The board


def test_the_board_is_shared_and_keeps_the_longest_stall() -> None:
    def serve(line: Line, say: Say) -> bytes:
        say([line.board["longest_ns"], line.board["journal"]])
        line.board["journal"] = line.number
        line.ready()
        if line.number < 3:
            die()
        return b""

    said = [each for each in outcome(serve) if isinstance(each, list)]
    assert said[0] == [0, 0] and said[1] == [0, 1]
    assert said[2][0] > 0 and said[2][1] == 2
