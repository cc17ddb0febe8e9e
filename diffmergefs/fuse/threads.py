"""Blocking work in worker threads while the event loop goes on."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable, Hashable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar, cast

import trio

from diffmergefs.core import workers
from diffmergefs.core.singleflight import SingleFlight

T = TypeVar("T")

#: How many threads a mount keeps in reserve for when it can start no other.
RESERVED = 4
#: How many filesystems must hang before all threads hang.
LANES = 4

# The argument that lets the caller leave a thread. trio 0.23 renamed it.
_MAY_BE_LEFT = (
    "abandon_on_cancel"
    if "abandon_on_cancel" in inspect.signature(trio.to_thread.run_sync).parameters
    else "cancellable"
)


async def in_thread(
    work: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None
) -> T:
    """The result of `work(*args)`, called in a worker thread.

    The caller can be cancelled at any time. `work` then goes on, and its result is lost. `limiter`
    limits the number of threads; the default is trio's own. If no thread can be started (pids.max),
    one of those that `reserved` keeps does the work, or the event loop itself does.
    """
    is_begun = False

    def begin() -> T:
        nonlocal is_begun
        is_begun = True
        return work(*args)

    run = cast(Callable[..., Any], trio.to_thread.run_sync)
    try:
        return cast(T, await run(begin, limiter=limiter, **{_MAY_BE_LEFT: True}))
    except RuntimeError:
        if is_begun:
            raise
    async with limiter or contextlib.nullcontext():
        return await _in_reserve(begin)


async def _in_reserve(work: Callable[[], T]) -> T:
    if _Reserve.queue is None:
        return work()
    future: Future[T] = Future()
    try:
        _Reserve.queue.put(functools.partial(_settle, future, work))
        await _ended(future)
        return future.result()
    finally:
        del future


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    finally:
        del future


def _work_off(queue: SimpleQueue[Callable[[], object] | None]) -> None:
    while (work := queue.get()) is not None:
        work()
        del work  # so that its arguments do not live until the next one comes


class _Reserve:
    queue: SimpleQueue[Callable[[], object] | None] | None = None


@contextmanager
def reserved(count: int = RESERVED) -> Iterator[None]:
    """Keep this many threads for `in_thread`, for when no other can be started.

    There are fewer, or none, if they cannot be started now. The end of the process does not wait
    for them.
    """
    queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
    work_off = functools.partial(_work_off, queue)
    threads = [workers.started(work_off, f"reserve-{n}") for n in range(count)]
    _Reserve.queue = queue if any(threads) else None
    try:
        yield
    finally:
        _Reserve.queue = None
        for _ in threads:
            queue.put(None)


class Lanes:
    """Threads for work on files: up to `each` per lane. A lane is a set of filesystems.

    If the server of one filesystem hangs, the other lanes keep their threads. There are LANES times
    `each` in all, so that many filesystems must hang before all threads do.
    """

    def __init__(self, each: int) -> None:
        self._each = each
        self._all = trio.CapacityLimiter(LANES * each)
        self._lanes: dict[Hashable, trio.CapacityLimiter] = {}

    async def run(self, lane: Hashable, work: Callable[..., T], *args: Any) -> T:
        """Call `in_thread` once the lane has a free thread. Its first use makes the lane."""
        if (room := self._lanes.get(lane)) is None:
            room = self._lanes[lane] = trio.CapacityLimiter(self._each)
        async with room:
            return await in_thread(work, *args, limiter=self._all)

    @property
    def busy(self) -> int:
        """How many threads are at work."""
        return self._all.borrowed_tokens


async def once_in_thread(
    shared: SingleFlight[T],
    key: Hashable,
    work: Callable[[], T],
    run: Callable[..., Awaitable[None]] = in_thread,
) -> T:
    """Like `shared.do`, with the work in a worker thread. Waiting for it takes no thread.

    `run` calls a function in a thread, as `in_thread` does. If the first caller is cancelled, the
    work goes on for the others, and for those who ask for it later.
    """
    while True:
        future, is_mine = shared.join(key)
        try:
            if is_mine:
                trio.lowlevel.spawn_system_task(_lead, shared, key, future, work, run)
            await _ended(future)
            return future.result()
        except CancelledError:
            continue
        finally:
            del future


async def _lead(
    shared: SingleFlight[T],
    key: Hashable,
    future: Future[T],
    work: Callable[[], T],
    run: Callable[..., Awaitable[None]],
) -> None:
    try:
        await run(shared.lead, key, future, work)
    finally:
        # At the end of trio's run this may have been cancelled before a thread began.
        shared.give_up(key, future)


async def _ended(future: Future[T]) -> None:
    ended, token = trio.Event(), trio.lowlevel.current_trio_token()

    def wake(_: Future[T]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(ended.set)

    future.add_done_callback(wake)
    await ended.wait()
