"""Work in threads, with any trio from 0.22 on."""

from __future__ import annotations

import inspect
import threading

import pytest
import trio
import trio.testing

from diffmergefs.core.singleflight import SingleFlight
from diffmergefs.fuse import threads
from diffmergefs.fuse.nodes import lane_of
from diffmergefs.fuse.threads import Lanes, in_thread, once_in_thread


def test_in_thread_returns_and_raises_what_the_work_does() -> None:
    async def main() -> None:
        assert await in_thread(lambda a, b: a + b, 1, 2) == 3
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 // 0)

    trio.run(main)


def test_a_cancelled_caller_does_not_wait_for_the_work() -> None:
    goes_on, ended = threading.Event(), threading.Event()

    def work() -> None:
        goes_on.wait()
        ended.set()

    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await in_thread(work)
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, work)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert not ended.is_set()

    try:
        trio.run(main)
    finally:
        goes_on.set()
    assert ended.wait(60)


def test_this_trio_knows_the_argument() -> None:
    assert threads._MAY_BE_LEFT in inspect.signature(trio.to_thread.run_sync).parameters


# Where no thread can be started


class NoMore:
    """From `begins` on, no thread can be started, and trio keeps no idle ones."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def begins(self) -> None:
        def start(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        self._patch.setattr(threading.Thread, "start", start)
        idle = trio._core._thread_cache.THREAD_CACHE._idle_workers
        self._patch.setattr(trio._core._thread_cache.THREAD_CACHE, "_idle_workers", type(idle)())


@pytest.fixture
def no_more(monkeypatch: pytest.MonkeyPatch) -> NoMore:
    return NoMore(monkeypatch)


def test_reserved_threads_do_the_work_when_no_other_can_start(no_more: NoMore) -> None:
    async def main() -> None:
        limiter = trio.CapacityLimiter(1)
        for n in range(10):
            found = await in_thread(lambda n=n: (n, threading.current_thread()), limiter=limiter)
            assert found[0] == n and found[1].name.startswith("reserve-")
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 // 0, limiter=limiter)
        assert limiter.borrowed_tokens == 0

    with threads.reserved(2):
        no_more.begins()
        trio.run(main)


def test_without_reserved_threads_the_event_loop_does_the_work(no_more: NoMore) -> None:
    async def main() -> None:
        assert await in_thread(threading.current_thread) is threading.main_thread()
        assert await once_in_thread(SingleFlight[int](), "key", lambda: 7) == 7

    no_more.begins()
    with threads.reserved():
        trio.run(main)


def test_an_error_of_the_work_is_not_taken_for_a_lack_of_threads() -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        raise RuntimeError("on purpose")

    async def main() -> None:
        with pytest.raises(RuntimeError, match="on purpose"):
            await in_thread(work)

    trio.run(main)
    assert calls == [1]


# Lanes


def test_a_lane_that_hangs_leaves_the_other_lanes_their_threads() -> None:
    go_on = threading.Event()

    async def main() -> None:
        lanes = Lanes(3)
        async with trio.open_nursery() as nursery:
            for hung in (lane_of(1), lane_of(1, 2), lane_of(3)):
                for _ in range(5):
                    nursery.start_soon(lanes.run, hung, go_on.wait)
            while lanes.busy < 9:
                await trio.sleep(0.001)
            await trio.testing.wait_all_tasks_blocked()
            assert lanes.busy == 9
            for _ in range(5):
                assert await lanes.run(lane_of(2), lambda: "goes on") == "goes on"
            go_on.set()

    try:
        trio.run(main)
    finally:
        go_on.set()
