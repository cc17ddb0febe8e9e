"""What a server tells its keeper, what that holds for the next, and the signals passed on."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from diffmergefs.system.line import Line, received
from tests.support.live import until
from tests.support.subjects.keeper import Say, die, keeping, outcome, signal_of


def memory(text: bytes) -> int:
    fd = os.memfd_create("held")
    os.write(fd, text)
    return fd


def content(fd: int) -> str:
    return os.pread(fd, 100, 0).decode()


# What is held


def test_what_is_held_outlives_its_server_and_what_is_dropped_does_not() -> None:
    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        if line.number == 1:
            two = line.hold(memory(b"one"), memory(b"two"))
            gone = line.hold(memory(b"gone"))
            line.drop(gone)
            line.drop(12345)
            say([two, gone])
            die()  # with all of this under way
        say({number: list(map(content, fds)) for number, fds in line.held.items()})
        if line.number == 2:
            line.hold(memory(b"three"))
            die()
        for number in line.held:
            line.drop(number)
        return b"done"

    with keeping(serve) as kept:
        said = [each for each in kept.rest() if each != "ready"]
    (two, gone), second, third, over, held = said
    assert gone != two and second == {f"{two}": ["one", "two"]}
    assert list(third.values()) == [["one", "two"], ["three"]]
    assert over[1] == "done" and held == []


def test_what_is_dropped_is_closed_in_the_keeper() -> None:
    def serve(line: Line, say: Say) -> bytes:
        reader, writer = os.pipe()
        number = line.hold(writer)
        os.close(writer)
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        say("held")
        line.drop(number)
        os.set_blocking(reader, True)
        say(os.read(reader, 1).decode())
        return b""

    assert outcome(serve)[:2] == ["held", ""]


def test_what_the_keeper_holds_no_program_inherits() -> None:
    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        if line.number == 1:
            fd = memory(b"x")
            os.set_inheritable(fd, True)
            line.hold(fd)
            die()
        ((fd,),) = line.held.values()
        say(os.get_inheritable(fd))
        return b""

    assert outcome(serve)[0] is False


def test_several_threads_hold_at_once() -> None:
    def serve(line: Line, say: Say) -> bytes:
        if line.number == 1:
            numbers: dict[int, str] = {}

            def hold(thread: int) -> None:
                for n in range(20):
                    fd, text = memory(f"{thread}.{n}".encode()), f"{thread}.{n}"
                    numbers[until_held(line, fd)] = text
                    os.close(fd)

            threads = [threading.Thread(target=hold, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            say(numbers)
            die()
        say({number: content(fds[0]) for number, fds in line.held.items()})
        return b""

    first, second = outcome(serve)[:2]
    assert len(first) == 80 and first == second


def until_held(line: Line, fd: int) -> int:
    while True:
        try:
            return line.hold(fd)
        except BlockingIOError:  # the keeper has much to do
            time.sleep(0.001)


def test_holding_and_dropping_never_block() -> None:
    def serve(line: Line, say: Say) -> bytes:
        fd = memory(b"x")
        numbers = [until_held(line, fd)]
        os.kill(line.keeper, signal.SIGSTOP)
        with pytest.raises(BlockingIOError):
            while True:
                numbers.append(line.hold(fd))
        for number in numbers:
            line.drop(number)
        os.kill(line.keeper, signal.SIGCONT)

        def is_told() -> bool:
            line.drop(12345)  # it tries again what it could not say before
            return not line._unsent

        until(is_told, "the keeper does not hear it")
        return b""

    with keeping(serve) as kept:
        assert kept.rest()[-1] == []


def test_numbers_by_which_things_are_held_are_never_used_again() -> None:
    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        numbers = [line.hold(memory(b"x")) for _ in range(3)]
        say(numbers)
        for number in numbers:
            line.drop(number)
        if line.number < 3:
            die()
        return b""

    said = [number for numbers in outcome(serve)[:3] for number in numbers]
    assert len(set(said)) == 9


# What is told


def test_a_server_knows_its_number_and_how_the_one_before_ended() -> None:
    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        say([line.number, line.reason, line.dump, line.fileno() == line.end.fileno()])
        if line.number == 1:
            die()
        return b""

    assert outcome(serve)[:2] == [[1, "", "", True], [2, "it was killed by SIGKILL", "", True]]


def test_what_the_service_manager_should_know_is_told() -> None:
    def serve(line: Line, say: Say) -> bytes:
        line.tell("STATUS=es läuft\nX=1")
        return b""

    assert outcome(serve)[0] == "tell STATUS=es läuft\nX=1"


def test_messages_of_a_server_are_all_heard_however_it_ends() -> None:
    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        if line.number == 1:
            for n in range(50):
                line.tell(str(n))
            die()
        return b""

    assert outcome(serve)[:-1] == [f"tell {n}" for n in range(50)]


# Signals


def test_signals_are_passed_on_and_the_next_server_knows_them() -> None:
    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        say([line.number, *line.signals])
        if line.number == 1:
            with pytest.raises(BlockingIOError):
                line.received()
            say("waits")
            say(f"got {signal_of(line)}")
            die()
        return b"done"

    with keeping(serve) as kept:
        while kept.hear() != "waits":
            pass
        os.kill(kept.process, signal.SIGTERM)
        assert [each for each in kept.rest() if each != "ready"][:3] == [
            f"got {signal.SIGTERM:d}",
            [2, signal.SIGTERM],
            ["over", "done", 2, "it ended with status 0"],
        ]


def test_a_signal_reaches_each_server_once() -> None:
    """The second one means something else."""

    def serve(line: Line, say: Say) -> bytes:
        line.ready()
        if line.number == 1:
            os.kill(line.keeper, signal.SIGTERM)
            signal_of(line)
            die()
        say([*line.signals])
        os.kill(line.keeper, signal.SIGHUP)
        say([signal_of(line)])
        return b"done"

    assert outcome(serve)[:2] == [[signal.SIGTERM], [signal.SIGHUP]]


# A keeper that dies


def test_a_server_outlives_its_keeper_and_knows_it() -> None:
    def serve(line: Line, say: Say) -> bytes:
        say(line.is_held)
        os.kill(line.keeper, signal.SIGKILL)
        until(lambda: not line.is_held, "it has the keeper still")
        say([signal_of(line), signal_of(line)])
        for _ in range(2):
            line.ready()
            line.tell("x")
            line.clear((1, 2, 3, 4))
            line.last_word(b"x")
            line.drop(line.hold(0))
        say("lives")
        return b""

    with keeping(serve) as kept:
        assert kept.rest() == [True, [None, None], "lives"]


# The keeper's end


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, two:
        yield one, two


def test_a_message_comes_with_its_descriptors(ends: tuple[socket.socket, socket.socket]) -> None:
    mine, its = ends
    with pytest.raises(BlockingIOError):
        received(mine)
    fds = [memory(b"one"), memory(b"two")]
    socket.send_fds(its, [b"message"], fds)
    its.send(b"another")
    message, found = received(mine)
    assert message == b"message" and list(map(content, found)) == ["one", "two"]
    assert not any(map(os.get_inheritable, found))
    for fd in (*fds, *found):
        os.close(fd)
    assert received(mine) == (b"another", [])
    its.close()
    assert received(mine) == (b"", [])


def test_at_the_limit_of_descriptors_some_are_missing(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    mine, its = ends
    fd = memory(b"x")
    socket.send_fds(its, [b"message"], [fd, fd])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    filled: list[int] = []
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 2, hard)
        )
        with pytest.raises(OSError) as caught:
            while True:
                filled.append(os.dup(fd))
        assert caught.value.errno == errno.EMFILE
        os.close(filled.pop())
        message, found = received(mine)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in filled:
            os.close(each)
    assert (message, len(found)) == (b"message", 1)
    os.close(found[0])
    os.close(fd)
