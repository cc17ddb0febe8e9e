"""The end of a mount: signals, detaching, and the state that a service manager gets."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyfuse3
import trio

from diffmergefs.core.errors import counted
from diffmergefs.fuse.operations import Operations
from diffmergefs.fuse.threads import in_thread
from diffmergefs.system.line import Line
from diffmergefs.system.mounted import OwnMount
from diffmergefs.system.mounttable import in_other_namespaces

log = logging.getLogger(__name__)

#: How long the end of a mount waits for its observer, whose storage may hang.
STOP_SECONDS = 2.0
_POLL_SECONDS = 0.6


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collect the signals that would end the process, in the list that `with` gives.

    Use it from before the mount is made until it is gone: an exception in between would leave a
    mount without a daemon. `Lifecycle.watch_signals` acts on the signals.
    """
    received: list[int] = []
    before = {n: signal.signal(n, lambda n, _: received.append(n)) for n in _ending_signals()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ending_signals() -> set[int]:
    # nohup(1) has SIGHUP ignored, and it stays ignored.
    hangup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else set()
    return {signal.SIGTERM, signal.SIGINT, *hangup}


class Lifecycle:
    """Ends a mount when a signal asks for it, and reports its state to a service manager.

    `own` is the mount, or None if the mount table cannot be read. The keeper at the other end of
    `line` gets the signals, and tells the service manager.
    """

    def __init__(self, operations: Operations, own: OwnMount | None, line: Line) -> None:
        self.own = own
        self.line = line
        self._operations = operations
        self.is_ready = False
        self._is_stopping = False
        self._is_ending = False  # at once, by an abort of our own if necessary

    async def watch_signals(
        self,
        nursery: trio.Nursery,
        early: Sequence[int],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Detach the mount at the first signal, and cancel the nursery at the second.

        `early` are the signals that came before.
        """
        send, receive = trio.open_memory_channel[int](8)
        nursery.start_soon(self._pass_on, send.clone())
        nursery.start_soon(self._follow_keeper, send)
        for number in early:
            await send.send(number)
        task_status.started()
        async for number in receive:
            name = signal.Signals(number).name
            if self._is_stopping:
                await self._end_now(name)
                nursery.cancel_scope.cancel()
                return
            self._is_stopping = True
            if self.own is not None:
                nursery.start_soon(self._detach, self.own, name)
            self.line.tell(f"STOPPING=1\nSTATUS={self._status()}")

    async def _follow_keeper(self, send: trio.MemorySendChannel[int]) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.line.fileno())
            try:
                number = self.line.received()
            except BlockingIOError:
                continue
            if number is None:
                break
            await send.send(number)
        log.warning("the keeper is gone: if this server dies too, the mount dies with it")
        if not self.is_ready:
            await send.send(signal.SIGTERM)  # nobody knows of this mount
            await send.send(signal.SIGTERM)

    async def _pass_on(self, send: trio.MemorySendChannel[int]) -> None:
        # A terminal and a service manager signal both processes. The keeper's counts.
        with trio.open_signal_receiver(*_ending_signals()) as signals:
            async for number in signals:
                if not self.line.is_held:
                    await send.send(number)

    async def report_status(self) -> None:
        """Send the status to the service manager whenever it changes."""
        sent = ""
        while True:
            if (status := self._status()) != sent:
                self.line.tell(f"STATUS={status}")
                sent = status
            await trio.sleep(_POLL_SECONDS)

    async def was_cut_off(self) -> bool:
        """Whether the connection, which has just ended, ended while the kernel had the mount."""
        if self.own is None or self._is_ending:
            return False
        if self.own.is_shown():
            return True
        # The daemon does not learn of the last close of a detached mount. But the kernel frees
        # such a mount at once, and keeps one that was cut off until its users are gone.
        open_files = self._operations.open_files
        with trio.move_on_after(STOP_SECONDS if open_files else 0):
            while self.own.is_known():
                await trio.sleep(STOP_SECONDS / 100)
            return False
        return open_files > 0

    def _status(self) -> str:
        files = counted(self._operations.open_files, "file")
        if self._is_stopping:
            also = len(self.own.elsewhere()) if self.own else 0
            mounts = f" and {counted(also, 'other mount')}" if also else ""
            return f"detached; {files}{mounts} open, serving until the last is closed"
        store = self._operations.tree.store
        images = "one image" if store is None else counted(len(store.tags()), "snapshot")
        return f"serving {images}, {files} open"

    async def _end_now(self, name: str) -> None:
        self._is_ending = True
        log.info("%s again: ending at once, %s open", name, self._open_files())
        # Requests must still be answered: a push may wait for a page that one of them reads, and
        # no signal reaches it there.
        with trio.move_on_after(3 * STOP_SECONDS):
            await in_thread(self._operations.observer.stop, STOP_SECONDS)
            if self.own is not None:
                await in_thread(self.own.detach)
        # Do not wait for requests that are being answered: their storage may hang.
        pyfuse3.terminate()

    def _open_files(self) -> str:
        number = self._operations.open_files
        return f"{counted(number, 'file')} {'is' if number == 1 else 'are'}"

    async def _detach(self, own: OwnMount, name: str) -> None:
        # The log comes first: with no file open, detaching is the end.
        if not await in_thread(own.obstacle):
            others = own.elsewhere()
            log.info(
                "%s: detached; %s open%s; serving until the last is closed%s",
                name,
                self._open_files(),
                f" and it is also mounted on {', '.join(others)}" if others else "",
                " and unmounted" if others else "",
            )
        logged = ""
        while obstacle := await in_thread(own.detach):
            if obstacle != logged:
                log.warning(
                    "%s: cannot detach: %s; trying again; %s open; a second signal ends the mount"
                    " at once",
                    name,
                    obstacle,
                    self._open_files(),
                )
            logged = obstacle
            await trio.sleep(_POLL_SECONDS)
        for place in await in_thread(in_other_namespaces, own.device, own.source):
            log.info("%s: still mounted on %s; serving until that is unmounted", name, place)
