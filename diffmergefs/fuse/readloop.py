"""How `pyfuse3.main` waits for the next request, and all that we assume of pyfuse3's inside.

With trio's own lock and wait, each request costs two task switches and three system calls beside
those that read and answer it: more than half of the CPU time of a small read. This module replaces
both. It relies on three facts that pyfuse3 does not document. They hold for 3.2.1 to 3.5.0:

1. pyfuse3 looks `trio` up in its own module (`pyfuse3.trio`) at each use. `pyfuse3.asyncio`
   replaces it there too.
2. Its session loop enters one `trio.Lock()`, calls `trio.lowlevel.wait_readable(fd)` with the
   descriptor of the FUSE device, leaves the lock, and reads the descriptor without another await.
3. A read that a signal ends (EINTR) is not an error: the loop waits for the next request.

A server also reads its first request by facts 1 and 2, without a wait (`ReadLoop.read_first`). If
the user switched the fast loop off, pyfuse3 waits in its own way. `ReadLoop.check` tells which is
in force. tests/unit/fuse/test_readloop.py fails with a
pyfuse3 for which one of the facts does not hold.
"""

from __future__ import annotations

import logging
import os
import select
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter_ns
from typing import Any

import pyfuse3
import trio
from trio.lowlevel import Abort, Task

log = logging.getLogger(__name__)

Wait = Callable[[int], Awaitable[None]]

#: How long to poll for the next request before trio waits for it, if requests come that fast. A
#: client that touches page after page sends the next one within this time. A wake-up from sleep,
#: perhaps by another CPU, takes longer.
SPIN_NS = 50_000
#: How long to answer one request after another before all other tasks run.
TURN_NS = 1_000_000
#: The interval of the alarm: a read that finds nothing takes hardly more than twice as long.
ALARM_SECONDS = 0.05
#: The interval of the alarm where nothing tells when pyfuse3 tries to read.
CONSTANT_ALARM_SECONDS = 0.2


@contextmanager
def read_loop(*, fast: bool = True) -> Iterator[ReadLoop]:
    """Make `pyfuse3.main` wait for requests as this module does, inside `with`.

    Call it in the main thread, before `pyfuse3.init`: pyfuse3 3.2.1 makes its lock there. It
    changes what pyfuse3 sees as trio, and nothing for other users of trio. If `fast` is False,
    pyfuse3 waits in its own way and the alarm rings all the time. Await `pyfuse3.main` inside `with
    loop.alarm`.
    """
    original = getattr(pyfuse3, "trio", None)
    loop = ReadLoop(fast=fast)
    if not fast:
        loop.alarm.ring_on()
    pyfuse3.trio = loop.as_trio()  # type: ignore[attr-defined]
    try:
        yield loop
    finally:
        pyfuse3.trio = original  # type: ignore[attr-defined]


class ReadLoop:
    """The lock and the wait that pyfuse3 gets, and whether it uses them.

    `alarm` must be entered while pyfuse3 waits.
    """

    def __init__(self, *, fast: bool) -> None:
        self.alarm = ReadAlarm()
        self._is_wanted = fast
        self._has_lock = False
        self._wait = RequestWait(self.alarm)

    def as_trio(self) -> object:
        """The module trio, except for the wait and, in the fast loop, the lock."""
        self._usual: Wait = self._wait if self._is_wanted else trio.lowlevel.wait_readable
        self._lowlevel = _Module(trio.lowlevel, wait_readable=self._usual)
        own = {"Lock": self._new_lock} if self._is_wanted else {}
        return _Module(trio, lowlevel=self._lowlevel, **own)

    def read_first(self, then: Callable[[], None]) -> None:
        """Let the first request be read without a wait; `then` is called before the next wait."""
        usual, is_first = self._usual, True

        def wait(fd: int) -> Awaitable[None]:
            nonlocal is_first
            if is_first:
                is_first = False
                return _AT_ONCE
            self._lowlevel.replace("wait_readable", usual)
            then()
            return usual(fd)

        self._lowlevel.replace("wait_readable", wait)

    def _new_lock(self) -> ReadLock:
        self._has_lock = True
        return ReadLock()

    @property
    def is_fast(self) -> bool:
        """Whether pyfuse3 uses both; known once it has answered a request."""
        return self._has_lock and self._wait.is_used

    def check(self) -> bool:
        """Log whether the fast loop is in force, and return it; call it after the first answer."""
        if self.is_fast:
            log.info("the fast read loop is in force")
        elif not self._is_wanted:
            log.info("the fast read loop is switched off")
        else:
            log.warning(
                "the fast read loop is not in force: pyfuse3 %s does not wait for requests as"
                " expected; the mount works, but small reads take about twice the CPU time",
                getattr(pyfuse3, "__version__", "of an unknown version"),
            )
            if not self._wait.is_used:
                self.alarm.ring_on()
        return self.is_fast


class _Module:
    # A module, except for some of its names.

    def __init__(self, module: object, **own: object) -> None:
        self.__dict__.update(own)
        self._module = module

    def replace(self, name: str, own: object) -> None:
        self.__dict__[name] = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _AtOnce:
    # Awaiting this does not wait, and is no checkpoint.

    def __await__(self) -> Generator[Any, Any, None]:
        return _NOTHING  # type: ignore[return-value]


_NOTHING = iter(())
_AT_ONCE = _AtOnce()


class ReadLock(trio.abc.Instrument):
    """A lock that costs a task nothing to release and to take again before it waits.

    A release wakes nobody at once: the other tasks wait until the current step of a task ends. A
    task that answered a request without a wait has taken the lock again by then. Otherwise (the
    answer waits for a thread, or the task has ended) the task that has waited longest gets it, so
    the lock is never free while a task waits for it. Taking a free lock is no checkpoint. A lock
    serves one run of trio.
    """

    def __init__(self) -> None:
        self._taken = False
        self._waiting: deque[Task] = deque()
        self._is_instrument = False

    def __aenter__(self) -> Awaitable[None]:
        if self._taken:
            return self._wait()
        self._taken = True
        return _AT_ONCE

    def __aexit__(self, *error: object) -> Awaitable[None]:
        self._taken = False
        return _AT_ONCE

    def after_task_step(self, task: Task) -> None:
        """Hand the lock on; trio calls this whenever any task waits or ends."""
        if not self._taken and self._waiting:
            self._taken = True  # for the task that is woken
            trio.lowlevel.reschedule(self._waiting.popleft())

    async def _wait(self) -> None:
        if not self._is_instrument:
            # Not in __init__, which may run before trio does.
            trio.lowlevel.add_instrument(self)
            self._is_instrument = True
        task = trio.lowlevel.current_task()
        self._waiting.append(task)

        def abort(_: object) -> Abort:
            self._waiting.remove(task)
            return Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)


class RequestWait:
    """`trio.lowlevel.wait_readable` for one descriptor on which requests follow each other fast.

    It finds a request that is there already without trio. It also polls for up to SPIN_NS for the
    next one, if the last request that trio waited for came fast. While it polls it offers the
    processor to other processes (sched_yield(2)). Other tasks run once in TURN_NS, and then this
    task sees its cancellation. From the end of a wait until the next one begins, the `alarm` rings
    to end a read that finds nothing. Raises what wait_readable raises.
    """

    def __init__(self, alarm: ReadAlarm | None = None) -> None:
        self._alarm = alarm or ReadAlarm()
        self._poll = select.poll()
        self._fd: int | None = None
        self._spin_ns = SPIN_NS
        self._turn_began = 0

    @property
    def is_used(self) -> bool:
        """Whether anything has waited by it."""
        return self._fd is not None

    def __call__(self, fd: int) -> Awaitable[None]:
        """Wait until the descriptor is readable."""
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
        # As in KVM's halt polling: polling pays as long as it need not last much longer.
        self._spin_ns = SPIN_NS if self._turn_began - began < 2 * SPIN_NS else 0
        self._alarm.expect()


class ReadAlarm(AbstractContextManager["ReadAlarm"]):
    """A signal (SIGALRM) that ends a read of the FUSE device that finds nothing to read.

    pyfuse3 reads a blocking descriptor once it is readable, and holds the interpreter's lock
    meanwhile. If the kernel takes the only request back in between, because its client got
    SIGKILL, read(2) sleeps until the next request comes. No thread and no timer runs meanwhile, and
    a guest whose CPUs all wait for pages sends no request. A signal ends the read with EINTR, and
    pyfuse3 waits anew.

    From `expect` on the alarm rings again and again, until it finds that `is_expected` is False.
    Enter it in the main thread, which is the one that it wakes, and leave it before `trio.run`
    ends: trio closes the socket that a signal writes to before it tells Python, and a signal in
    between prints a traceback. The end of `with` restores the signal's handler and its timer.
    Outside of `with` it does nothing, but then it rings from the beginning if it was told to
    before. A mount without requests has no alarms: while nothing is read no timer is set, and
    setting a timer twice for each request would cost more than the check. No child inherits the
    timer, and Python repeats any call of its own that the signal interrupts.
    """

    def __init__(self, seconds: float = ALARM_SECONDS) -> None:
        self.is_expected = False
        self._seconds = seconds
        self._is_set = True  # as long as there is no handler

    def __enter__(self) -> ReadAlarm:
        self._timer_before = signal.setitimer(signal.ITIMER_REAL, 0)
        self._handler_before = signal.signal(signal.SIGALRM, self._ring)
        self._is_set = False
        if self.is_expected:
            self.expect()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_set, self.is_expected = True, False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler_before)
        signal.setitimer(signal.ITIMER_REAL, *self._timer_before)

    def expect(self) -> None:
        """Ring while a read is tried, which may find nothing; set `is_expected` to False after."""
        self.is_expected = True
        if not self._is_set:
            self._is_set = True
            signal.setitimer(signal.ITIMER_REAL, self._seconds, self._seconds)

    def ring_on(self) -> None:
        """Ring all the time from now on, because nothing tells when a read is tried."""
        self._seconds = CONSTANT_ALARM_SECONDS
        self.expect()

    def _ring(self, number: int, frame: object) -> None:
        # The signal itself does the work. This runs in the same thread as `expect`, between two of
        # its steps: a later read sets the timer again.
        if not self.is_expected:
            self._is_set = False
            signal.setitimer(signal.ITIMER_REAL, 0)
