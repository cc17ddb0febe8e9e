"""How the tasks of pyfuse3 wait for the next request: with few switches and few system calls.

pyfuse3 has several tasks, of which the one that has its lock waits for a request, reads it and
gives the lock back before it answers. With trio's lock and trio's waiting, each request takes two
switches of tasks and three system calls beside those that read and answer it; more than half of the
processor's time that a small read takes, and it is what decides how many a mount can answer.
"""

from __future__ import annotations

import logging
import os
import select
from collections import deque
from collections.abc import Awaitable, Generator, Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from typing import Any

import pyfuse3
import trio
from trio.lowlevel import Abort, Task

from diffmergefs.fuse.readalarm import ALWAYS_SECONDS, ReadAlarm

log = logging.getLogger(__name__)

#: For how long a request is looked for before trio waits for one, if they come that fast. A client
#: that touches page after page sends the next within this time of its answer, and to be woken from
#: sleep, perhaps by another CPU, takes longer.
SPIN_NS = 50_000
#: For how long requests are answered one after another before all other tasks have their turn.
TURN_NS = 1_000_000


@contextmanager
def few_switches() -> Iterator[None]:
    """Inside, `pyfuse3.main` waits for requests as this module has it. For the main thread.

    `pyfuse3.init` belongs inside too: pyfuse3 3.2.1 makes its lock there. Nothing else that uses
    trio is touched. A pyfuse3 that was told to use something else than trio is left as it is, but
    for the alarm (`readalarm`), which then rings all the time.
    """
    original = getattr(pyfuse3, "trio", None)
    if original is not trio:
        log.debug("pyfuse3 does not use trio as it is known: it waits for requests in its own way")
        with ReadAlarm(ALWAYS_SECONDS) as alarm:
            alarm.expect()
            yield
        return
    with ReadAlarm() as alarm:
        lowlevel = _Module(trio.lowlevel, wait_readable=RequestWait(alarm))
        # pyfuse3 looks names up in this module each time; its asyncio support replaces it likewise.
        pyfuse3.trio = _Module(trio, Lock=ReadLock, lowlevel=lowlevel)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            pyfuse3.trio = original  # type: ignore[attr-defined]


class _Module:
    # A module, but for some of its names.

    def __init__(self, module: object, **own: object) -> None:
        self.__dict__.update(own)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _AtOnce:
    # To await this is no wait, and no checkpoint.

    def __await__(self) -> Generator[Any, Any, None]:
        return _NOTHING  # type: ignore[return-value]


_NOTHING = iter(())
_AT_ONCE = _AtOnce()


class ReadLock(trio.abc.Instrument):
    """A lock that a task gives back for nothing, if it takes it again before it waits.

    Whoever gives it back keeps the others waiting until a step of a task ends: who has answered a
    request without a wait has taken it again by then. Else (the answer waits for a thread, or the
    task has ended) the one that has waited longest gets it then, so that it is never free while
    somebody waits for it. To take it while it is free is no checkpoint. For one run of trio.
    """

    def __init__(self) -> None:
        self._taken = False
        self._waiting: deque[Task] = deque()
        self._is_told = False

    def __aenter__(self) -> Awaitable[None]:
        if self._taken:
            return self._wait()
        self._taken = True
        return _AT_ONCE

    def __aexit__(self, *error: object) -> Awaitable[None]:
        self._taken = False
        return _AT_ONCE

    def after_task_step(self, task: Task) -> None:
        """Called by trio whenever any task waits, or ends."""
        if not self._taken and self._waiting:
            self._taken = True  # for the one that is woken
            trio.lowlevel.reschedule(self._waiting.popleft())

    async def _wait(self) -> None:
        if not self._is_told:
            # Not when it is made, which may be before trio runs.
            trio.lowlevel.add_instrument(self)
            self._is_told = True
        task = trio.lowlevel.current_task()
        self._waiting.append(task)

        def abort(_: object) -> Abort:
            self._waiting.remove(task)
            return Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)


class RequestWait:
    """`trio.lowlevel.wait_readable`, for one descriptor on which requests follow each other fast.

    One that is there already is found without trio; one that comes within SPIN_NS too, if the last
    that trio waited for came fast. Meanwhile the processor is offered to others (sched_yield(2)).
    Other tasks have their turn once in TURN_NS, and the cancellation of this one is seen then.
    From its end until it begins anew the `alarm` is expected to end a read that finds nothing.
    Raises what wait_readable raises.
    """

    def __init__(self, alarm: ReadAlarm | None = None) -> None:
        self._alarm = alarm or ReadAlarm()
        self._poll = select.poll()
        self._fd: int | None = None
        self._spin_ns = SPIN_NS
        self._turn_began = 0

    def __call__(self, fd: int) -> Awaitable[None]:
        self._alarm.is_expected = False
        if fd != self._fd:
            self._poll, self._fd = select.poll(), fd
            self._poll.register(fd, select.POLLIN)
        began = perf_counter_ns()
        if began - self._turn_began < TURN_NS:
            while not self._poll.poll(0):
                if perf_counter_ns() - began >= self._spin_ns:
                    return self._wait(fd, began)
                os.sched_yield()
            self._alarm.expect()
            return _AT_ONCE
        return self._wait(fd, began)

    async def _wait(self, fd: int, began: int) -> None:
        await trio.lowlevel.wait_readable(fd)
        self._turn_began = perf_counter_ns()
        # As KVM's halt polling: worth it as long as it would not have to be much longer.
        self._spin_ns = SPIN_NS if self._turn_began - began < 2 * SPIN_NS else 0
        self._alarm.expect()
