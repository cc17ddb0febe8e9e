"""One VM, from its connection to its end, in a thread of its own."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.extents import Extent
from diffmergefs.core.view import MergedView
from diffmergefs.uffd.handshake import received, wait_for_message
from diffmergefs.uffd.memory import Ended, Memory, Unservable
from diffmergefs.uffd.peer import Peer, has_ended, may_end, unreadable
from diffmergefs.uffd.recording import Recording
from diffmergefs.uffd.status import Counters, Served
from diffmergefs.uffd.userfault import Pending

log = logging.getLogger(__name__)

_RETRY_MS = 1


@dataclass(frozen=True)
class Plan:
    """How VMs are served: from `view`, with `around` bytes about each fault.

    `kills` says that a VM which cannot be served is killed. `ahead` gives the pieces of the image
    to copy ahead, and `recording` records touches if it is there.
    """

    view: MergedView
    around: int
    kills: bool
    ahead: Callable[[], list[Extent]]
    recording: Recording | None = None


class Refused(Exception):
    """A connection that is not served; the text says why, in one line."""


class Unused(Exception):
    """A connection that ended before anything came, as of a program that looks who listens."""


@dataclass(eq=False)
class Vm:
    """The VM behind a connection. `run` serves it in the calling thread.

    `plan_now` may block, and raises DiffMergeError if the image cannot be served. `plan` is what it
    gave, once somebody has connected.
    """

    connection: socket.socket
    plan_now: Callable[[], Plan]
    image: str
    plan: Plan | None = None
    peer: Peer | None = None
    connected: float = field(default_factory=time.time)
    counters: Counters = field(default_factory=Counters)
    problem: str | None = None
    accepted: bool = False

    def served(self) -> Served | None:
        """What its status shows; None before it is accepted."""
        if self.peer is None or not self.accepted:
            return None
        faults = self.counters.faults
        return Served(
            self.peer.pid, self.peer.uid, self.image, self.connected, faults, self.problem
        )

    def run(self, accepted: Callable[[], None]) -> None:
        """Shake hands, call `accepted`, and serve until its process has ended.

        Raises Refused or Unused if it is not served at all. If it cannot be served to its end,
        `problem` is set. Then it is killed if the plan says so and that is allowed; if not, it
        waits for its page for ever, and this returns at its end. The connection is closed.
        """
        with ExitStack() as held, self.connection:
            try:
                self.peer = Peer.of(self.connection)
                pidfd = self.peer.open_pidfd(self.connection)
                held.callback(os.close, pidfd)
            except OSError as error:
                raise Refused(f"it is not known who connects: {error}") from error
            try:
                wait_for_message(self.connection)  # nothing is opened for who only looks
                self.plan = plan = self.plan_now()
                if (path := unreadable(plan.view.layers, self.peer)) is not None:
                    raise Refused(f"{self.peer} may not read {path}")
                regions, source = received(self.connection, plan.view.size)
            except ConnectionAbortedError as error:
                raise Unused from error
            except (DiffMergeError, ValueError, OSError) as error:
                raise Refused(f"{self.peer}: {error}") from error
            held.callback(source.close)
            if plan.kills and not may_end(pidfd):
                log.warning(
                    "%s may not be killed by this user: if it cannot be served, it hangs", self.peer
                )
            self.accepted = True
            accepted()
            memory = Memory(plan.view, regions, source, plan.around, self.counters)
            if plan.recording is not None:
                memory.touched = plan.recording.begin().add
                held.callback(plan.recording.end)
            try:
                self._serve(memory, deque(plan.ahead()), source.fd, pidfd)
            except Ended:
                _wait(pidfd)
            except Unservable as error:
                self._fail(str(error), pidfd, kills=plan.kills)
            except Exception:
                log.exception("serving %s failed: this is a bug", self.peer)
                self._fail("a bug, see the log", pidfd, kills=plan.kills)

    def _serve(self, memory: Memory, ahead: deque[Extent], faults: int, pidfd: int) -> None:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.register(faults, select.POLLIN)
        while True:
            timeout = 0 if ahead else _RETRY_MS if memory.is_waiting else None
            has_events = memory.is_waiting
            for fd, what in poller.poll(timeout):
                if fd == pidfd:
                    return
                if what != select.POLLIN:
                    # It was not made for use, or its other holder has it block.
                    raise Unservable("the userfaultfd cannot be polled")
                has_events = True
            if has_events:
                memory.serve()
            if ahead and not memory.is_waiting:
                with suppress(Pending):
                    memory.ahead(*ahead[0])
                    ahead.popleft()

    def _fail(self, problem: str, pidfd: int, *, kills: bool) -> None:
        if has_ended(pidfd):
            return
        self.problem = problem
        killed = False
        if kills:
            with suppress(OSError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                killed = True
        then = "it was killed" if killed else "it hangs"
        log.error("%s cannot be served any more, and %s: %s", self.peer, then, problem)
        _wait(pidfd)


def _wait(pidfd: int) -> None:
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    ended.poll()
