"""A mount and the process that serves it: options, the event loop, and scans of the source."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyfuse3
import trio

from diffmergefs.checks.host import obstacles
from diffmergefs.core.beneath import closing_fd
from diffmergefs.core.errors import DiffMergeError, MountAbortedError, MountFailedError, counted
from diffmergefs.core.workers import closing_in_threads
from diffmergefs.fuse import threads
from diffmergefs.fuse.dropbehind import DropBehind
from diffmergefs.fuse.handles import ObservedMount, Observer
from diffmergefs.fuse.lifecycle import STOP_SECONDS, Lifecycle, deferred_signals
from diffmergefs.fuse.operations import Operations
from diffmergefs.fuse.readloop import ReadLoop, read_loop
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.threads import in_thread
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.opener import raise_descriptor_limit
from diffmergefs.sidecars import (
    bmapreader,  # noqa: F401  (a daemon outlives an upgrade of the package, and meets new seals)
)
from diffmergefs.system import tuning
from diffmergefs.system.daemon import Notifier
from diffmergefs.system.mounted import OwnMount
from diffmergefs.system.mountpoint import FUSE_CONF, others_may_be_let_in
from diffmergefs.system.mounttable import Mount, mount_entry
from diffmergefs.system.tuning import Tuning

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.6
SLOW_SECONDS = 5.0  # how long a scan may take before the log says so
# How many requests may be under way at once. Further ones wait in the kernel, fast ones too.
_MAX_REQUESTS = 10_000
_NOT_WRITABLE = ("no write access to mountpoint", "not owned by user")  # fusermount3's words


def session_options(
    source: str, extra: Sequence[str], *, allow_other: bool, open_rw: bool
) -> set[str]:
    """The mount options of a session that shows `source`. `extra` are further ones for libfuse."""
    options = {_escaped(option) for option in (f"fsname={source}", *extra)}
    options |= {"subtype=diffmergefs", "default_permissions", "nosuid", "nodev", "noexec"}
    if allow_other:
        options.add("allow_other")
    if not open_rw:
        options.add("ro")
    return options


def _escaped(option: str) -> str:
    # libfuse splits options at commas.
    return option.replace("\\", "\\\\").replace(",", "\\,")


@dataclass(kw_only=True)
class Session:
    """A mount of `tree` on `mountpoint`, and its service.

    `mountpoint` is a real path that `check_mountpoint` accepted, and `options` are those of
    `session_options`. The session sets `tuning`, and then calls `ready` once it answers requests.
    The `notifier` gets the numbers of snapshots and open files, and the stop. `observe` makes the
    observer of what clients open and read. With `drop_behind` the session drops pages of layers
    from the page cache once it has served them. With `fast_loop` pyfuse3 waits for requests as
    `readloop` does.
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

    def __post_init__(self) -> None:
        self._dropping = DropBehind() if self.drop_behind else None
        self._operations = Operations(self.tree, self._dropping)
        self._is_ready = False

    def serve(self) -> None:
        """Mount, and serve until the mount is gone. Call it once, in the main thread.

        SIGTERM and SIGINT (and SIGHUP, unless it is ignored) detach the mount; the session then
        serves until the last file is closed. A second signal ends it at once. Raises
        MountFailedError, and MountAbortedError (which it logs) if another process ended the
        connection to the kernel while the kernel still had the mount.
        """
        raise_descriptor_limit()
        waiting = read_loop(fast=self.fast_loop)
        with deferred_signals() as early, waiting as loop, closing_in_threads(), threads.reserved():
            self._mount()
            entry = self._mount_entry()
            own = OwnMount(entry) if entry else None
            lifecycle = Lifecycle(self._operations, own, self.notifier)
            try:
                if self.observe is not None:
                    self._operations.observer = self.observe(_observed(self.tree, own))
                was_cut_off = trio.run(self._run, lifecycle, loop, early)
            finally:
                # Nothing may call into a session that is closed.
                self._operations.observer.stop(STOP_SECONDS)
                self._operations.observer.close()
                # After a detach, another mount may stand at the same place. Leave that one alone.
                pyfuse3.close(unmount=self._mount_entry() == entry)
                if self._dropping is not None:
                    self._dropping.close()
        if was_cut_off:
            error = MountAbortedError(
                f"{self.mountpoint}: the connection to the kernel was ended from outside (aborted,"
                f" or `umount -f`); {counted(self._operations.open_files, 'file')} open: their"
                " readers get errors"
            )
            log.warning("%s", error)
            raise error

    def _mount(self) -> None:
        with closing_fd(os.memfd_create("stderr")) as said:
            try:
                with _stderr_to(said):
                    pyfuse3.init(self._operations, self.mountpoint, set(map(_Option, self.options)))
            except RuntimeError as error:
                reason = _reason([*_lines(said), str(error)], self.options)
                raise MountFailedError(f"{self.mountpoint}: cannot be mounted: {reason}") from error
            for line in _lines(said):
                log.warning("%s", line)

    def _mount_entry(self) -> Mount | None:
        try:
            return mount_entry(self.mountpoint)
        except OSError as error:
            log.warning("cannot read the mount table: %s", error)
            return None

    async def _run(self, lifecycle: Lifecycle, loop: ReadLoop, early: Sequence[int]) -> bool:
        # Whether the connection was ended while the kernel still had the mount.
        was_cut_off = False  # so it stays if a second signal cancels the nursery
        async with trio.open_nursery() as nursery:
            await nursery.start(lifecycle.watch_signals, nursery, early)
            if self.notifier:
                nursery.start_soon(lifecycle.report_status)
            if self.tree.store is not None:
                nursery.start_soon(watch_source, self.tree.store)
            nursery.start_soon(self._become_ready, lifecycle.own, loop)
            try:
                with loop.alarm:
                    await pyfuse3.main(max_tasks=_MAX_REQUESTS)
            except* ConnectionAbortedError:
                # The mount is gone. A reader of the next request gets ENODEV, which is the normal
                # end, but one that had just taken a request gets this (fuse_dev_do_read in
                # fs/fuse/dev.c, since Linux 4.2).
                log.debug("the connection ended while a request was read")
            was_cut_off = await lifecycle.was_cut_off()
            if not was_cut_off and not self._is_ready:
                self.ready()  # the mount was up, and a signal came before it could say so
            nursery.cancel_scope.cancel()
        return was_cut_off

    async def _become_ready(self, own: OwnMount | None, loop: ReadLoop) -> None:
        # The answer to the first request undoes what was set before it.
        await self._operations.answers.wait()
        self._operations.metrics.fast_loop = loop.check()
        readahead = await in_thread(tuning.tune, own.device, self.tuning) if own else None
        self._operations.observer.ready(readahead)
        log.info("ready")
        self._is_ready = True
        self.ready()


def _observed(tree: Tree, own: OwnMount | None) -> ObservedMount:
    return ObservedMount(
        device=own.device if own else None,
        path_of=tree.path_of,
        store_pages=pyfuse3.notify_store,
        run_in_main_thread=_run_in_main_thread,
    )


def _run_in_main_thread(function: Callable[[], None]) -> None:
    try:
        trio.from_thread.run_sync(function, trio_token=pyfuse3.trio_token)
    except RuntimeError as error:
        raise OSError(errno.ENOTCONN, "the mount is ending") from error


@contextmanager
def _stderr_to(fd: int) -> Iterator[None]:
    # libfuse and fusermount3 write the reason of a failure to descriptor 2.
    with closing_fd(os.dup(2)) as stderr:
        os.dup2(fd, 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)


def _lines(fd: int) -> list[str]:
    return os.pread(fd, 1 << 16, 0).decode(errors="replace").splitlines()


def _reason(said: Sequence[str], options: set[str]) -> str:
    # The cause and the remedy. The last line is pyfuse3's, which knows no cause.
    asked = {"allow_other", "allow_root"} & options
    if asked and os.geteuid() != 0 and not others_may_be_let_in():
        return (
            f"--allow-other needs the line user_allow_other in {FUSE_CONF}, unless root mounts; ask"
            " root to add it, or omit --allow-other"
        )
    if known := obstacles():
        return "; ".join(known)
    cause = next((line for line in said if line.startswith(("fuse: ", "fusermount3: "))), said[-1])
    if any(words in cause for words in _NOT_WRITABLE):
        return f"{cause}; mount on a directory that this user owns"
    return f"{cause}; `diffmergefs doctor` shows what mounting needs"


class _Option(str):
    # pyfuse3 encodes options as ASCII, but the path in fsname may hold any byte.

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))


def wait_until_stable(store: Store) -> None:
    """Scan the store until fresh snapshots have been seen twice, so that the mount shows them."""
    if store.look():
        time.sleep(LOOK_SECONDS)
        store.look()


async def watch_source(store: Store) -> None:
    """Scan the store again and again. A scan that fails or lasts is reported in the log."""
    reported = ""
    while True:
        started = trio.current_time()
        await trio.sleep(LOOK_SECONDS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_report_slow_scan, store)
            reported = await _scan(store, reported)
            nursery.cancel_scope.cancel()
        # Scans of a very large directory must not keep a processor busy.
        await trio.sleep(max(0.0, trio.current_time() - started - 2 * LOOK_SECONDS))


async def _scan(store: Store, reported: str) -> str:
    # Returns the failure, so that the log has it once.
    try:
        await in_thread(store.look)
    except DiffMergeError as error:
        if str(error) != reported:
            effect = "stays as it was" if store.tags() else "shows nothing"
            log.warning("the mount %s until this is fixed: %s", effect, error)
        return str(error)
    except Exception:
        log.exception("scanning the source failed: this is a bug")
        return reported
    return ""


async def _report_slow_scan(store: Store) -> None:
    started = trio.current_time()
    await trio.sleep(SLOW_SECONDS)
    log.warning(
        "%s: scanning it takes longer than %g s; the mount follows changes when the scan is done;"
        " does some storage in it hang?",
        store.root,
        SLOW_SECONDS,
    )
    try:
        await trio.sleep_forever()
    finally:
        log.info("%s: scanning it took %.0f s", store.root, trio.current_time() - started)
