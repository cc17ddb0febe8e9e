"""A mount and the processes that serve it: the keeper, and a server's event loop."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pyfuse3
import trio

from diffmergefs.core.errors import MountAbortedError, counted
from diffmergefs.core.workers import closing_in_threads
from diffmergefs.fuse import threads
from diffmergefs.fuse.device import Device, open_devices
from diffmergefs.fuse.dropbehind import DropBehind
from diffmergefs.fuse.handles import ObservedMount, Observer
from diffmergefs.fuse.handover import Handover
from diffmergefs.fuse.lifecycle import STOP_SECONDS, Lifecycle, deferred_signals
from diffmergefs.fuse.looking import watch_source
from diffmergefs.fuse.mounting import mount
from diffmergefs.fuse.operations import Operations
from diffmergefs.fuse.readloop import ReadLoop, read_loop
from diffmergefs.fuse.threads import in_thread
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.opener import raise_descriptor_limit
from diffmergefs.sidecars import (
    bmapreader,  # noqa: F401  (a daemon outlives an upgrade of the package, and meets new seals)
)
from diffmergefs.system import tuning
from diffmergefs.system.board import Board
from diffmergefs.system.connection import Connection
from diffmergefs.system.daemon import Notifier
from diffmergefs.system.keeper import Keeper
from diffmergefs.system.line import Line
from diffmergefs.system.mounted import OwnMount
from diffmergefs.system.mounttable import Mount, mount_entry
from diffmergefs.system.tuning import Tuning

log = logging.getLogger(__name__)

# How many requests may be under way at once. Further ones wait in the kernel, fast ones too.
_MAX_REQUESTS = 10_000
_ENDED, _CUT_OFF = b"ended", b"cut off"  # a server's last word


@dataclass(kw_only=True)
class Session:
    """A mount of `tree` on `mountpoint`, and its service.

    `mountpoint` is a real path that `check_mountpoint` accepted, and `options` are those of
    `session_options`. The session calls `before_servers`, starts a server, sets `tuning`, and calls
    `ready` once the server answers requests, and in each server `leave_caller` then. The `notifier`
    gets the numbers of snapshots and open files, and the stop. `observe` makes the observer of what
    clients open and read. With `drop_behind` the session drops pages of layers from the page cache
    once it has served them. With `fast_loop` pyfuse3 waits for requests as `readloop` does.
    `watchdog` is the keeper's.
    """

    tree: Tree
    mountpoint: str
    options: set[str]
    ready: Callable[[], None]
    notifier: Notifier = field(default_factory=Notifier)
    tuning: Tuning = Tuning()  # noqa: RUF009  (it is frozen)
    observe: Callable[[ObservedMount], Observer] | None = None
    drop_behind: bool = False
    fast_loop: bool = True
    leave_caller: Callable[[], None] = lambda: None
    before_servers: Callable[[], None] = lambda: None
    watchdog: float = 0

    def __post_init__(self) -> None:
        self._dropping = DropBehind() if self.drop_behind else None
        self._operations = Operations(self.tree, self._dropping)

    def serve(self) -> None:
        """Mount, and serve until the mount is gone. Call it once, in the main thread.

        This process becomes the keeper; servers that it starts do the rest. SIGTERM and SIGINT (and
        SIGHUP, unless it is ignored) detach the mount; it is then served until the last file is
        closed. A second signal ends it at once. Raises MountFailedError, and MountAbortedError
        (which the log has) if another process ended the connection to the kernel while the kernel
        still had the mount, or if no server could go on.
        """
        raise_descriptor_limit()
        waiting = read_loop(fast=self.fast_loop)
        with deferred_signals() as received, waiting as loop:
            others = open_devices()  # which our caller may have left open
            mount(self._operations, self.mountpoint, self.options)
            device = Device(others)
            entry = self._mount_entry()
            self._own = OwnMount(entry) if entry else None
            connection = Connection(entry.device if entry else None)
            keeper = Keeper(
                serve=functools.partial(self._serve, loop, device, connection, entry),
                ready=self.ready,
                tell=lambda text: self.notifier.notify(*text.split("\n")),
                end=connection.abort,
                signals=received,
                covers=device.resends,
                watchdog=self.watchdog,
            )
            self._handover = Handover(keeper.board) if keeper.covers else None
            if self._handover and self.tree.explicit:
                self._handover.inherit(self.tree.explicit)
            self.before_servers()
            word = keeper.run()
        if word is None and len(received) < 2:
            raise self._cut_off(f"the server died ({keeper.reason}), and no other can go on")
        if word == _CUT_OFF:
            raise MountAbortedError(f"{self.mountpoint}: the connection was ended from outside")

    def _cut_off(self, reason: str) -> MountAbortedError:
        error = MountAbortedError(f"{self.mountpoint}: {reason}; readers of open files get errors")
        log.error("%s", error)
        return error

    def _serve(
        self,
        loop: ReadLoop,
        device: Device,
        connection: Connection,
        entry: Mount | None,
        line: Line,
    ) -> bytes:
        # In a server. Returns its last word.
        operations = self._operations
        introduction = device.begin(line.board, resend=line.number > 1)
        loop.read_first(introduction.finish)
        lifecycle = Lifecycle(operations, self._own, line)
        with closing_in_threads(), threads.reserved():
            operations.take_over(line, self._handover)
            if self.observe is not None:
                operations.observer = self.observe(self._observed(connection, line))
            was_cut_off = trio.run(self._run, lifecycle, loop)
            # After an exception another server goes on, with the mount as it is. Nothing may call
            # into a session that is closed.
            operations.observer.stop(STOP_SECONDS)
            operations.observer.close()
            # After a detach, another mount may stand at the same place. Leave that one alone.
            pyfuse3.close(unmount=self._mount_entry() == entry)
            if self._dropping is not None:
                self._dropping.close()
        if not was_cut_off:
            return _ENDED
        log.warning(
            "%s: the connection to the kernel was ended from outside (aborted, or `umount -f`);"
            " %s open: their readers get errors",
            self.mountpoint,
            counted(operations.open_files, "file"),
        )
        return _CUT_OFF

    def _mount_entry(self) -> Mount | None:
        try:
            return mount_entry(self.mountpoint)
        except OSError as error:
            log.warning("cannot read the mount table: %s", error)
            return None

    async def _run(self, lifecycle: Lifecycle, loop: ReadLoop) -> bool:
        # Whether the connection was ended while the kernel still had the mount.
        was_cut_off = False  # so it stays if a second signal cancels the nursery
        line = lifecycle.line
        async with trio.open_nursery() as nursery:
            await nursery.start(lifecycle.watch_signals, nursery, line.signals)
            if self.notifier:
                nursery.start_soon(lifecycle.report_status)
            if self.tree.store is not None:
                nursery.start_soon(watch_source, self.tree.store)
            if self._handover is not None:
                self._handover.wake = _soon(self._handover.tend)
            if self.watchdog:
                nursery.start_soon(_beat, line.board, self.watchdog / 8)
            nursery.start_soon(self._become_ready, lifecycle, loop)
            try:
                with loop.alarm:
                    await pyfuse3.main(max_tasks=_MAX_REQUESTS)
            except* ConnectionAbortedError:
                # The mount is gone. A reader of the next request gets ENODEV, which is the normal
                # end, but one that had just taken a request gets this (fuse_dev_do_read in
                # fs/fuse/dev.c, since Linux 4.2).
                log.debug("the connection ended while a request was read")
            was_cut_off = await lifecycle.was_cut_off()
            if not was_cut_off and not lifecycle.is_ready:
                line.ready()  # the mount was up, and a signal came before it could say so
            nursery.cancel_scope.cancel()
        return was_cut_off

    async def _become_ready(self, lifecycle: Lifecycle, loop: ReadLoop) -> None:
        # The answer to the first request undoes what was set before it.
        await self._operations.answers.wait()
        own, line, handover = lifecycle.own, lifecycle.line, self._handover
        self._operations.metrics.fast_loop = loop.check()
        readahead = handover.readahead if handover else None
        if readahead is None:
            readahead = await in_thread(tuning.tune, own.device, self.tuning) if own else None
            if handover:
                handover.tuned(readahead)
        self._operations.observer.ready(readahead or None)
        lifecycle.is_ready = True
        if line.number == 1:
            log.info("ready")
        else:
            log.warning("server %d took over: %s", line.number, line.reason)
        if line.dump:
            _log_traceback("what the last server did", line.dump)
        if line.number == 1 and self._handover is None:
            log.info(
                "this kernel keeps no requests for another server (Linux 6.9 does): if this server"
                " dies, the mount ends"
            )
        line.ready()
        self.leave_caller()

    def _observed(self, connection: Connection, line: Line) -> ObservedMount:
        return ObservedMount(
            device=self._own.device if self._own else None,
            path_of=self.tree.path_of,
            store_pages=pyfuse3.notify_store,
            abort=connection.abort,
            is_guarded=lambda: (
                line.is_held and (self._handover is not None or connection.can_abort)
            ),
        )


def _log_traceback(what: str, text: str) -> None:
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, what, (), None)
    record.exc_text = "\n".join(f"    {line}" for line in text.splitlines())
    log.handle(record)


def _soon(work: Callable[[], None]) -> Callable[[], None]:
    # A function for any thread that has the event loop call `work`.
    token = trio.lowlevel.current_trio_token()

    def ask() -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(work, idempotent=True)

    return ask


async def _beat(board: Board, seconds: float) -> None:
    while True:
        board["beat"] = time.monotonic_ns()
        await trio.sleep(seconds)
