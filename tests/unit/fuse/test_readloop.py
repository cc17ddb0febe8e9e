"""The read loop: the lock, the wait, the alarm, and what this pyfuse3 makes of them."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pyfuse3
import pytest
import trio
import trio.testing

from diffmergefs.fuse import readloop
from diffmergefs.fuse.readloop import (
    CONSTANT_ALARM_SECONDS,
    SPIN_NS,
    TURN_NS,
    ReadAlarm,
    ReadLock,
    RequestWait,
    read_loop,
)
from tests.support.live import until

# The lock


def test_a_lock_taken_again_before_a_wait_stays() -> None:
    order = []

    async def other(lock: ReadLock) -> None:
        async with lock:
            order.append("other")

    async def main() -> None:
        lock = ReadLock()
        async with trio.open_nursery() as nursery:
            for n in range(3):
                async with lock:
                    order.append(str(n))
                    if n == 0:
                        nursery.start_soon(other, lock)
                        await trio.testing.wait_all_tasks_blocked()  # it waits for the lock

    trio.run(main)
    assert order == ["0", "1", "2", "other"]


@pytest.mark.parametrize("end", ["waits", "returns", "raises"])
def test_it_goes_to_those_who_wait_in_their_order_once_the_task_waits_or_ends(end: str) -> None:
    order = []

    async def first(lock: ReadLock) -> None:
        with suppress(ValueError):
            async with lock:
                await trio.testing.wait_all_tasks_blocked(0.01)
            order.append("given back")
            if end == "waits":
                await trio.sleep_forever()
            if end == "raises":
                raise ValueError

    async def other(name: str, lock: ReadLock) -> None:
        async with lock:
            order.append(name)
            await trio.testing.wait_all_tasks_blocked()
            assert order[-1] == name  # nobody else has it meanwhile

    async def main() -> None:
        lock = ReadLock()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first, lock)
            await trio.testing.wait_all_tasks_blocked()
            for name in ("a", "b", "c"):
                nursery.start_soon(other, name, lock)
                await trio.testing.wait_all_tasks_blocked()
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert order == ["given back", "a", "b", "c"]


def test_one_that_is_cancelled_while_it_waits_does_not_get_it() -> None:
    order = []

    async def other(name: str, scope: trio.CancelScope, lock: ReadLock) -> None:
        with scope:
            async with lock:
                order.append(name)

    async def main() -> None:
        lock, gone = ReadLock(), trio.CancelScope()
        async with trio.open_nursery() as nursery, lock:
            nursery.start_soon(other, "gone", gone, lock)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(other, "there", trio.CancelScope(), lock)
            await trio.testing.wait_all_tasks_blocked()
            gone.cancel()
        # Nobody has it now: it is taken at once.
        with trio.testing.assert_no_checkpoints():
            async with lock:
                order.append("again")

    trio.run(main)
    assert order == ["there", "again"]


def test_one_that_is_cancelled_when_it_has_just_got_it_gives_it_back() -> None:
    async def other(scope: trio.CancelScope, lock: ReadLock) -> None:
        with scope:
            async with lock:
                await trio.lowlevel.checkpoint()

    async def main() -> None:
        lock, scope = ReadLock(), trio.CancelScope()
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(other, scope, lock)
                await trio.testing.wait_all_tasks_blocked()
            lock.after_task_step(trio.lowlevel.current_task())
            scope.cancel()
        assert scope.cancelled_caught
        with trio.testing.assert_no_checkpoints():
            async with lock:
                pass

    trio.run(main)


def test_it_may_be_made_before_trio_runs() -> None:
    # As pyfuse3 3.2.1 does.
    lock, order = ReadLock(), []

    async def other() -> None:
        async with lock:
            order.append("other")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(other)
                await trio.testing.wait_all_tasks_blocked()
            order.append("given back")

    trio.run(main)
    assert order == ["given back", "other"]


def test_an_error_inside_goes_on_and_the_lock_is_given_back() -> None:
    async def main() -> None:
        lock = ReadLock()
        with pytest.raises(ValueError, match="inside"):
            async with lock:
                raise ValueError("inside")
        async with lock:
            pass

    trio.run(main)


# The wait


class Clock:
    """Stands in for perf_counter_ns: it goes on by `step` whenever it is looked at.

    `yields` counts how often the processor was offered to others; `after_yields` is what happens
    when that was done so many times.
    """

    def __init__(self, step: int) -> None:
        self.now = 10**9
        self.step = step
        self.yields = 0
        self.after_yields: dict[int, Callable[[], object]] = {}

    def __call__(self) -> int:
        self.now += self.step
        return self.now

    def sched_yield(self) -> None:
        self.yields += 1
        self.after_yields.get(self.yields, lambda: None)()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(SPIN_NS // 10)
    monkeypatch.setattr(readloop, "perf_counter_ns", clock)
    monkeypatch.setattr(os, "sched_yield", clock.sched_yield)
    return clock


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


async def waited(wait: RequestWait, fd: int) -> bool:
    """Wait; whether trio was needed for it."""
    try:
        with trio.testing.assert_no_checkpoints():
            await wait(fd)
    except AssertionError:
        return True
    return False


def test_what_is_there_is_found_without_trio_until_it_is_the_others_turn(
    clock: Clock, pipe: tuple[int, int]
) -> None:
    # All is there always, so others have a turn just where trio is asked.
    os.write(pipe[1], b"x")
    clock.step = TURN_NS // 10

    async def main() -> list[bool]:
        wait = RequestWait()
        return [await waited(wait, pipe[0]) for _ in range(21)]

    # Of ten looks at the clock in a turn the first begins it, and the others are one a request.
    assert trio.run(main) == [True, *[False] * 9] * 2 + [True]
    assert clock.yields == 0


def test_other_tasks_run_though_requests_never_cease(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")

    async def main() -> None:
        wait, turns = RequestWait(), []

        async def other() -> None:
            for n in range(5):
                turns.append(n)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            while len(turns) < 5:
                await wait(pipe[0])

    trio.run(main)


def test_what_comes_soon_is_waited_for_without_trio(clock: Clock, pipe: tuple[int, int]) -> None:
    async def main() -> None:
        wait = RequestWait()
        os.write(pipe[1], b"x")
        assert await waited(wait, pipe[0])  # the first turn begins
        os.read(pipe[0], 1)
        clock.after_yields[4] = lambda: os.write(pipe[1], b"x")
        assert not await waited(wait, pipe[0])

    trio.run(main)
    assert clock.yields == 4


def test_it_is_looked_for_no_longer_than_the_limit_and_then_trio_waits(
    clock: Clock, pipe: tuple[int, int]
) -> None:
    async def main() -> None:
        wait = RequestWait()
        os.write(pipe[1], b"x")
        await wait(pipe[0])
        os.read(pipe[0], 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, pipe[0])
            await trio.testing.wait_all_tasks_blocked()
            assert clock.yields == 9
            os.write(pipe[1], b"x")

    trio.run(main)


@pytest.mark.parametrize(("later", "looks"), [(0, 9), (2 * SPIN_NS, 0)])
def test_after_a_long_wait_nothing_is_looked_for(
    clock: Clock, pipe: tuple[int, int], later: int, looks: int
) -> None:
    async def wait_for(wait: RequestWait, later: int) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, pipe[0])
            await trio.testing.wait_all_tasks_blocked()
            clock.now += later
            os.write(pipe[1], b"x")
        os.read(pipe[0], 1)

    async def main() -> None:
        wait = RequestWait()
        await wait_for(wait, later)
        clock.yields = 0
        await wait_for(wait, 0)
        assert clock.yields == looks
        # That one came fast.
        clock.yields = 0
        await wait_for(wait, 0)
        assert clock.yields == 9

    trio.run(main)


def test_another_descriptor_is_not_taken_for_the_one_before(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        wait = RequestWait()
        os.write(pipe[1], b"x")
        await wait(pipe[0])
        reader, writer = os.pipe()
        try:
            with trio.move_on_after(0.01) as scope:
                await wait(reader)
            assert scope.cancelled_caught
            os.write(writer, b"x")
            await wait(reader)
        finally:
            os.close(reader)
            os.close(writer)

    trio.run(main)


def test_one_that_is_being_closed_raises_what_trio_does(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        async def expect() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await RequestWait()(pipe[0])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect)
            await trio.testing.wait_all_tasks_blocked()
            trio.lowlevel.notify_closing(pipe[0])

    trio.run(main)


# The alarm

OFF = (0.0, 0.0)
_read = ctypes.CDLL(None, use_errno=True).read


def read_as_pyfuse3(pipe: tuple[int, int]) -> int:
    """The errno of a read(2), which Python's own would take up again; 0 if there was something.

    One that would sleep for ever finds something after a while.
    """
    late = threading.Timer(20, os.write, (pipe[1], b"late"))
    late.start()
    try:
        count = _read(pipe[0], ctypes.create_string_buffer(1), 1)
        return ctypes.get_errno() if count < 0 else 0
    finally:
        late.cancel()
        late.join()


@pytest.mark.parametrize("needs_trio", [True, False])
def test_a_request_that_is_taken_back_does_not_keep_the_reader(
    pipe: tuple[int, int], needs_trio: bool
) -> None:
    async def main() -> None:
        with ReadAlarm() as alarm:
            wait = RequestWait(alarm)
            for _ in range(1 if needs_trio else 2):
                os.write(pipe[1], b"x")
                await wait(pipe[0])
                os.read(pipe[0], 1)
            for _ in range(3):  # not the first alarm only
                assert read_as_pyfuse3(pipe) == errno.EINTR

    trio.run(main)


def test_nothing_rings_once_nothing_is_read(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        with ReadAlarm() as alarm:
            wait = RequestWait(alarm)
            assert signal.getitimer(signal.ITIMER_REAL) == OFF
            for _ in range(2):
                os.write(pipe[1], b"x")
                await wait(pipe[0])
                assert signal.getitimer(signal.ITIMER_REAL) != OFF
                os.read(pipe[0], 1)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait, pipe[0])  # as an idle mount waits
                    while signal.getitimer(signal.ITIMER_REAL) != OFF:
                        await trio.sleep(0.01)
                    nursery.cancel_scope.cancel()

    trio.run(main)


def test_it_rings_on_while_a_read_is_tried_and_no_longer() -> None:
    rings = 0

    class Counting(ReadAlarm):
        def _ring(self, number: int, frame: object) -> None:
            nonlocal rings
            rings += 1
            super()._ring(number, frame)

    with Counting(0.001) as alarm:
        alarm.expect()
        until(lambda: rings > 20, "it does not ring")
        alarm.is_expected = False
        until(lambda: signal.getitimer(signal.ITIMER_REAL) == OFF, "it rings on")


def test_handler_and_timer_are_put_back() -> None:
    def other(number: int, frame: object) -> None: ...

    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    signal.signal(signal.SIGALRM, other)
    signal.setitimer(signal.ITIMER_REAL, 1000, 2000)
    try:
        with ReadAlarm() as alarm:
            alarm.expect()
        assert signal.getsignal(signal.SIGALRM) is other
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert interval == 2000 and 900 < left <= 1000
        # Outside it sets nothing.
        alarm.expect()
        ReadAlarm().expect()
        assert signal.getitimer(signal.ITIMER_REAL)[1] == 2000
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


# What pyfuse3 gets


def test_pyfuse3_sees_these_inside_and_all_else_of_trio() -> None:
    with pytest.raises(ValueError, match="inside"), read_loop():
        inside = pyfuse3.trio  # type: ignore[attr-defined]
        assert isinstance(inside.Lock(), ReadLock)
        assert isinstance(inside.lowlevel.wait_readable, RequestWait)
        assert inside.lowlevel.notify_closing is trio.lowlevel.notify_closing
        assert inside.open_nursery is trio.open_nursery
        raise ValueError("inside")
    assert pyfuse3.trio is trio  # type: ignore[attr-defined]
    assert trio.Lock.__name__ == "Lock" != ReadLock.__name__


def test_a_pyfuse3_that_uses_something_else_has_it_back_afterwards(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = object()
    monkeypatch.setattr(pyfuse3, "trio", other)
    with read_loop() as loop, loop.alarm:
        assert not loop.check()
        assert_rings_all_the_time()
    assert pyfuse3.trio is other  # type: ignore[attr-defined]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "is not in force" in record.message


def test_a_pyfuse3_that_does_not_wait_as_expected_is_noticed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with read_loop() as loop, loop.alarm:
        assert signal.getitimer(signal.ITIMER_REAL) == OFF
        assert not loop.check()
        assert_rings_all_the_time()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "is not in force" in record.message


def test_the_fast_loop_can_be_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    with read_loop(fast=False) as loop:
        inside = pyfuse3.trio  # type: ignore[attr-defined]
        assert inside.Lock is trio.Lock
        assert inside.lowlevel.wait_readable is trio.lowlevel.wait_readable
        with loop.alarm:
            assert_rings_all_the_time()
        assert signal.getitimer(signal.ITIMER_REAL)[1] == 0
        assert not loop.check()
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "the fast read loop is switched off")
    ]


@pytest.mark.parametrize("fast", [True, False])
def test_the_first_request_is_read_without_a_wait(fast: bool) -> None:
    """There is none to wait for at the device: the keeper has read it."""
    done: list[str] = []

    async def main() -> None:
        reader, writer = os.pipe()
        lowlevel = pyfuse3.trio.lowlevel  # type: ignore[attr-defined]
        with loop.alarm:
            await lowlevel.wait_readable(reader)
            assert not done
            os.write(writer, b"x")
            for _ in range(2):
                await lowlevel.wait_readable(reader)
                assert done == ["then"]
            os.read(reader, 1)
            with trio.move_on_after(0.01) as scope:
                await lowlevel.wait_readable(reader)
            assert scope.cancelled_caught
        os.close(reader)
        os.close(writer)

    with read_loop(fast=fast) as loop:
        loop.read_first(lambda: done.append("then"))
        trio.run(main)


def assert_rings_all_the_time() -> None:
    assert signal.getitimer(signal.ITIMER_REAL)[1] == pytest.approx(CONSTANT_ALARM_SECONDS)


# What we assume of pyfuse3. If one of these fails with a new version of it, read the top of
# diffmergefs/fuse/readloop.py before you change anything.
