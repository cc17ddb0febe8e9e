"""Work in threads: what the event loop gets of it, with any trio from 0.22 on."""

from __future__ import annotations

import inspect
import threading

import pytest
import trio
import trio.testing

from diffmergefs.serving import threads
from diffmergefs.serving.threads import in_thread


def test_it_gives_what_the_work_gives_and_raises_what_it_raises() -> None:
    async def main() -> None:
        assert await in_thread(lambda a, b: a + b, 1, 2) == 3
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 // 0)

    trio.run(main)


def test_who_is_cancelled_does_not_wait_for_the_work() -> None:
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


def test_this_trio_knows_the_word_for_it() -> None:
    assert threads._MAY_BE_LEFT in inspect.signature(trio.to_thread.run_sync).parameters
