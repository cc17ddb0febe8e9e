"""Work that several want at the same time is done once; nobody is left without an outcome."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from diffmergefs.core.singleflight import SingleFlight
from diffmergefs.fuse.threads import in_thread, once_in_thread
from tests.support.live import until


class Work:
    """Counts how often it was begun, and goes on when it is told to; then gives or raises `end`."""

    def __init__(self, end: object = "done") -> None:
        self.begun: list[threading.Thread] = []
        self.go_on = threading.Event()
        self.end = end

    def __call__(self) -> object:
        self.begun.append(threading.current_thread())
        assert self.go_on.wait(60)
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end


def in_threads(count: int, call: Callable[[], object]) -> tuple[list[threading.Thread], list[Any]]:
    """So many threads that are under way, and what each gets or raises once it has ended."""
    outcomes: list[Any] = []

    def note() -> None:
        try:
            outcomes.append(call())
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=note) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, outcomes


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


# In threads


@pytest.mark.parametrize("end", ["done", None, OSError(5, "on purpose")], ids=repr)
def test_all_who_ask_get_the_one_outcome(end: object) -> None:
    flights, work = SingleFlight[object](), Work(end)
    threads, outcomes = in_threads(8, lambda: flights.do("key", work))
    until(lambda: work.begun, "nobody began")
    # Others have their own.
    assert flights.do("another key", lambda: 7) == 7
    work.go_on.set()
    join(threads)
    assert len(outcomes) == 8 and all(outcome is end for outcome in outcomes)
    # Not one was late enough to begin it again, or it says so; nothing is remembered.
    work.begun.clear()
    work.end = "again"
    assert flights.do("key", work) == "again" and len(work.begun) == 1


def test_when_the_one_who_does_it_is_interrupted_another_does_it() -> None:
    flights, first, second = SingleFlight[object](), Work(KeyboardInterrupt()), Work("done")
    leader, interrupted = in_threads(1, lambda: flights.do("key", first))
    until(lambda: first.begun, "nobody began")
    threads, outcomes = in_threads(4, lambda: flights.do("key", second))
    assert not second.begun
    first.go_on.set()
    join(leader)
    until(lambda: second.begun, "nobody took it over")
    second.go_on.set()
    join(threads)
    assert isinstance(interrupted[0], KeyboardInterrupt)
    assert outcomes == ["done"] * 4


def test_an_error_keeps_nothing_alive() -> None:
    # A layer that was opened in vain is closed at once, not when cycles are looked for.
    class Opened:
        pass

    alive: list[weakref.ref[Opened]] = []

    def fail() -> None:
        opened = Opened()
        alive.append(weakref.ref(opened))
        raise OSError(5, "on purpose")

    async def in_the_loop() -> None:
        with pytest.raises(OSError):
            await once_in_thread(SingleFlight[None](), "key", fail)

    gc.disable()
    try:
        with pytest.raises(OSError):
            SingleFlight[None]().do("key", fail)
        assert alive[0]() is None
    finally:
        gc.enable()
    trio.run(in_the_loop)


# In the event loop


@pytest.mark.parametrize("end", ["done", None, OSError(5, "on purpose")], ids=repr)
def test_many_tasks_wait_for_it_in_one_thread(end: object) -> None:
    flights, work = SingleFlight[object](), Work(end)
    outcomes: list[object] = []

    async def ask(limiter: trio.CapacityLimiter) -> None:
        try:
            run = partial(in_thread, limiter=limiter)
            outcomes.append(await once_in_thread(flights, "key", work, run))
        except OSError as error:
            outcomes.append(error)

    async def main() -> None:
        limiter = trio.CapacityLimiter(10)
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(ask, limiter)
            await trio.testing.wait_all_tasks_blocked()
            assert limiter.borrowed_tokens == 1
            work.go_on.set()

    trio.run(main)
    assert len(outcomes) == 50 and all(outcome is end for outcome in outcomes)
    assert len(work.begun) == 1 and work.begun[0] is not threading.main_thread()


@pytest.mark.parametrize("end", ["done", OSError(5, "on purpose")], ids=repr)
def test_when_the_first_is_cancelled_the_others_get_it_all_the_same(end: object) -> None:
    flights, work = SingleFlight[object](), Work(end)
    outcomes: list[object] = []

    async def ask(scope: trio.CancelScope) -> None:
        with scope:
            try:
                outcomes.append(await once_in_thread(flights, "key", work))
            except OSError as error:
                outcomes.append(error)

    async def main() -> None:
        first, second = trio.CancelScope(), trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ask, second)
            await trio.testing.wait_all_tasks_blocked()
            first.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert outcomes == []
            work.go_on.set()
        assert first.cancelled_caught and not second.cancelled_caught

    trio.run(main)
    assert outcomes == [end]
    assert len(work.begun) == 1


def test_the_first_may_be_cancelled_before_there_is_a_thread_for_it() -> None:
    flights, work = SingleFlight[object](), Work()
    outcomes: list[object] = []

    async def ask(scope: trio.CancelScope, limiter: trio.CapacityLimiter) -> None:
        with scope:
            run = partial(in_thread, limiter=limiter)
            outcomes.append(await once_in_thread(flights, "key", work, run))

    async def main() -> None:
        limiter, first = trio.CapacityLimiter(1), trio.CancelScope()
        await limiter.acquire()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, first, limiter)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ask, trio.CancelScope(), limiter)
            await trio.testing.wait_all_tasks_blocked()
            first.cancel()
            await trio.testing.wait_all_tasks_blocked()
            work.go_on.set()
            limiter.release()

    trio.run(main)
    assert outcomes == ["done"] and len(work.begun) == 1


def test_what_the_end_of_the_loop_gives_up_is_done_by_who_waits_in_a_thread() -> None:
    flights, waiter = SingleFlight[object](), Work()
    waiter.go_on.set()

    async def main() -> None:
        limiter = trio.CapacityLimiter(1)
        await limiter.acquire()
        run = partial(in_thread, limiter=limiter)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(once_in_thread, flights, "key", Work("never"), run)
            await trio.testing.wait_all_tasks_blocked()
            threads.extend(in_threads(1, lambda: outcomes.append(flights.do("key", waiter)))[0])
            nursery.cancel_scope.cancel()

    threads: list[threading.Thread] = []
    outcomes: list[object] = []
    trio.run(main)
    join(threads)
    assert outcomes == ["done"]
