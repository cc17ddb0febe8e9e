"""Work that may block, done in threads while the event loop goes on."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar, cast

import trio

from diffmergefs.once import Once

T = TypeVar("T")

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
    `limiter` says how many may be under way, by default trio's own does.
    """
    run = cast(Callable[..., Any], trio.to_thread.run_sync)
    return cast(T, await run(work, *args, limiter=limiter, **{_MAY_BE_LEFT: True}))


async def once_in_thread(
    shared: Once[T],
    key: Hashable,
    work: Callable[[], T],
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    """As `shared.do`, but the work is done in a worker thread, and to wait for it takes none.

    It goes on for the others, and for whoever asks for it later, when the one who was first is
    cancelled.
    """
    while True:
        future, is_mine = shared.join(key)
        try:
            if is_mine:
                trio.lowlevel.spawn_system_task(_lead, shared, key, future, work, limiter)
            await _ended(future)
            return future.result()
        except CancelledError:
            continue
        finally:
            del future


async def _lead(
    shared: Once[T],
    key: Hashable,
    future: Future[T],
    work: Callable[[], T],
    limiter: trio.CapacityLimiter | None,
) -> None:
    try:
        await in_thread(shared.lead, key, future, work, limiter=limiter)
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
