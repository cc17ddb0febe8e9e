"""Work that may block, done in threads while the event loop goes on."""

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

from diffmergefs.core import background
from diffmergefs.core.singleflight import SingleFlight

T = TypeVar("T")

#: How many threads a mount keeps for when no more can be started.
RESERVED = 4
#: How many filesystems must hang before all threads do.
LANES = 4

# trio 0.23 gave it another name, and later versions know only that.
_MAY_BE_LEFT = (
    "abandon_on_cancel"
    if "abandon_on_cancel" in inspect.signature(trio.to_thread.run_sync).parameters
    else "cancellable"
)


async def in_thread(
    work: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None
) -> T:
    """What `work(*args)` gives or raises, called in a worker thread.

    The caller can be cancelled at any time; `work` then ends alone, and nobody hears of it.
    `limiter` says how many may be under way, by default trio's own does. Where no thread can be
    started (pids.max), one of those that `reserved` keeps does it, or the event loop itself.
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
        del work  # what it holds must not live until the next comes


class _Reserve:
    queue: SimpleQueue[Callable[[], object] | None] | None = None


@contextmanager
def reserved(count: int = RESERVED) -> Iterator[None]:
    """Inside, so many threads are there for `in_thread` when no other can be started.

    Fewer or none where they cannot be started now. The end of the process does not wait for them.
    """
    queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
    work_off = functools.partial(_work_off, queue)
    threads = [background.started(work_off, f"reserve-{n}") for n in range(count)]
    _Reserve.queue = queue if any(threads) else None
    try:
        yield
    finally:
        _Reserve.queue = None
        for _ in threads:
            queue.put(None)


class Lanes:
    """Threads for work on files: `each` for one lane, which is one filesystem or a set of them.

    A filesystem whose server hangs leaves the other lanes theirs, as long as not LANES of them do:
    so many times `each` are there in all.
    """

    def __init__(self, each: int) -> None:
        self._each = each
        self._all = trio.CapacityLimiter(LANES * each)
        self._lanes: dict[Hashable, trio.CapacityLimiter] = {}

    async def run(self, lane: Hashable, work: Callable[..., T], *args: Any) -> T:
        """`in_thread`, once there is room in the lane, which is made at its first use."""
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
    """As `shared.do`, but the work is done in a worker thread, and to wait for it takes none.

    `run` calls a function in a thread, as `in_thread` does. The work goes on for the others, and
    for whoever asks for it later, when the one who was first is cancelled.
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
        # At the end of trio's run it may have been cancelled before a thread took it up.
        shared.give_up(key, future)


async def _ended(future: Future[T]) -> None:
    ended, token = trio.Event(), trio.lowlevel.current_trio_token()

    def tell(_: Future[T]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(ended.set)

    future.add_done_callback(tell)
    await ended.wait()
