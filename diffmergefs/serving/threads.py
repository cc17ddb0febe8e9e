"""Work that may block, done in threads while the event loop goes on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import trio

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
