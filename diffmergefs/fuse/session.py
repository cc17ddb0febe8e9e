"""Mounting and serving: session options, signals, the event loop, and the end (law 10)."""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pyfuse3
import trio

from diffmergefs.checks.host import FUSE_CONF, obstacles, others_may_be_let_in
from diffmergefs.core.background import closing_in_threads
from diffmergefs.core.errors import DiffMergeError, MountAbortedError, MountFailedError, counted
from diffmergefs.fuse import threads
from diffmergefs.fuse.dropbehind import DropBehind
from diffmergefs.fuse.observer import MountedSession, Observer
from diffmergefs.fuse.operations import Operations
from diffmergefs.fuse.readloop import ReadLoop, read_loop
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.threads import in_thread
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.opener import raise_descriptor_limit
from diffmergefs.sidecars import (
    bmapreader,  # noqa: F401  (a daemon outlives an upgrade of the package, and meets new seals)
)
from diffmergefs.system import mountpoint as mountpoints
from diffmergefs.system import tuning
from diffmergefs.system.mountpoint import OwnMount
from diffmergefs.system.mounttable import Mount, in_other_namespaces
from diffmergefs.system.sdnotify import Notifier
from diffmergefs.system.tuning import Tuning

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.6
SLOW_SECONDS = 5.0  # how long a look may take before the log says so
# How many may be under way at once. Those beyond wait in the kernel, also for what is not slow.
_MAX_REQUESTS = 10_000
# For how long the end waits for a push: it may read from storage that hangs.
_STOP_SECONDS = 2.0
_ABORTED = (
    "%s: the connection to the kernel was ended from outside (aborted, or `umount -f`); %s open:"
    " whoever uses what is open gets errors"
)
_REFUSED_OPTIONS = {
    *("rw", "suid", "dev", "exec"),
    *("max_read", "fsname", "subtype", "fd", "rootmode", "user_id", "group_id"),
}


def session_options(
    source: str, extra: Sequence[str], *, allow_other: bool, open_rw: bool
) -> set[str]:
    """The mount options of a session that shows `source`; `extra` are the user's own.

    Raises MountFailedError for one that would break the session.
    """
    for option in extra:
        if option.split("=", 1)[0] in _REFUSED_OPTIONS:
            raise MountFailedError(f"-o {option}: cannot be used with a read-only FUSE view")
    name = source.replace("\\", "\\\\").replace(",", "\\,")
    options = {f"fsname={name}", "subtype=diffmergefs", "default_permissions"}
    options |= {"nosuid", "nodev", "noexec"} | set(extra)
    if allow_other:
        options.add("allow_other")
    if not open_rw:
        options.add("ro")
    return options


def wait_until_stable(store: Store) -> None:
    """Scan the store until fresh snapshots have been seen twice, so that the mount shows them."""
    if store.look():
        time.sleep(LOOK_SECONDS)
        store.look()


def serve(
    tree: Tree,
    mountpoint: str,
    options: set[str],
    ready: Callable[[], None],
    notifier: Notifier,
    wanted: Tuning = Tuning(),  # noqa: B008  (it is frozen)
    observe: Callable[[MountedSession], Observer] | None = None,
    *,
    drop_behind: bool = False,
    fast_loop: bool = True,
) -> None:
    """Mount the tree on `mountpoint` and serve until it is unmounted; `ready` is called once it
    answers.

    `mountpoint` is a real path that `check_mountpoint` accepted. `notifier` is told how many
    snapshots are shown and files open, and of the stop. `wanted` is asked of the kernel before it
    is ready. `observe` makes the observer of what clients open and read. With `drop_behind`,
    layers' pages are dropped from the page cache once they were served. With `fast_loop` pyfuse3
    waits for requests as `readloop` does. Call it in the main thread. On SIGTERM and SIGINT (and
    SIGHUP, unless it is ignored) the
    mount is detached and served on until its last file is closed; a second signal ends it at once.
    Raises MountFailedError, and MountAbortedError if the connection to the kernel was ended by
    somebody else while the kernel still had the mount; that is logged too.
    """
    raise_descriptor_limit()
    dropping = DropBehind() if drop_behind else None
    operations = Operations(tree, dropping)
    waiting = read_loop(fast=fast_loop)
    with _signals_kept() as early, waiting as loop, closing_in_threads(), threads.reserved():
        try:
            pyfuse3.init(operations, mountpoint, {_Option(option) for option in options})
        except RuntimeError as error:
            raise MountFailedError(f"{mountpoint}: {_why_not(error, options)}") from error
        entry = _entry_at(mountpoint)
        own = OwnMount(entry) if entry else None
        try:
            if observe is not None:
                operations.observer = observe(_as_observed(tree, own))
            run = functools.partial(_run, operations, own, ready, early, notifier, loop)
            is_cut_off = trio.run(run, wanted)
        finally:
            # Nothing may call into a session that is closed.
            operations.observer.stop(_STOP_SECONDS)
            operations.observer.close()
            # Once detached, another mount may stand at the same place: that one is not ours to end.
            pyfuse3.close(unmount=_entry_at(mountpoint) == entry)
            if dropping is not None:
                dropping.close()
    if is_cut_off:
        text = _ABORTED % (mountpoint, counted(operations.open_files, "file"))
        log.warning("%s", text)
        raise MountAbortedError(text)


def _as_observed(tree: Tree, own: OwnMount | None) -> MountedSession:
    return MountedSession(
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


def _why_not(error: RuntimeError, options: set[str]) -> str:
    asked = {"allow_other", "allow_root"} & options
    if asked and os.geteuid() != 0 and not others_may_be_let_in():
        return (
            f"--allow-other takes the line user_allow_other in {FUSE_CONF}, unless root mounts;"
            " have it added there, or leave --allow-other out"
        )
    reasons = obstacles() or ["`diffmergefs doctor` looks at what it takes"]
    return "; ".join([str(error), *reasons])


class _Option(str):
    # pyfuse3 encodes options as ASCII, but the path in fsname may hold anything.

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))


@contextmanager
def _signals_kept() -> Iterator[list[int]]:
    # From before the mount is made until after it is gone, a signal that ends a process is only
    # noted, but for what _watch_signals does with it: an exception in between would leave a mount
    # without a daemon.
    noted: list[int] = []
    before = {n: signal.signal(n, lambda n, _: noted.append(n)) for n in _ending_signals()}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ending_signals() -> set[int]:
    # nohup(1) has SIGHUP ignored, and so it stays.
    hangup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else set()
    return {signal.SIGTERM, signal.SIGINT, *hangup}


def _entry_at(mountpoint: str) -> Mount | None:
    try:
        return mountpoints.mount_entry(mountpoint)
    except OSError as error:
        log.warning("the table of mounts cannot be read: %s", error)
        return None


async def _run(
    operations: Operations,
    own: OwnMount | None,
    ready: Callable[[], None],
    early: Sequence[int],
    notifier: Notifier,
    loop: ReadLoop,
    wanted: Tuning,
) -> bool:
    # Whether the connection was ended while the kernel still had the mount.
    service = _Service(operations, notifier, own)
    is_cut_off = False
    async with trio.open_nursery() as nursery:
        watch = functools.partial(_watch_signals, operations, own, nursery, early)
        await nursery.start(watch, service)
        if notifier:
            nursery.start_soon(service.tell_on)
        if operations.tree.store is not None:
            nursery.start_soon(_watch_source, operations.tree.store)
        up = trio.Event()
        nursery.start_soon(_say_ready, operations, own, loop, ready, wanted, up)
        try:
            await pyfuse3.main(max_tasks=_MAX_REQUESTS)
        except* ConnectionAbortedError:
            # The mount is gone. To whoever reads the next request the kernel then says ENODEV,
            # which is the end, but this to one that had just taken a request (fuse_dev_do_read in
            # fs/fuse/dev.c, since Linux 4.2).
            log.debug("the connection ended while a request was read")
        if own is not None and not service.is_ending:
            is_cut_off = await _is_cut_off(own, operations.open_files)
        if not is_cut_off and not up.is_set():
            ready()  # it was up, and was asked to stop before it could say so
        nursery.cancel_scope.cancel()
    return is_cut_off


async def _is_cut_off(own: OwnMount, open_files: int) -> bool:
    # Of the last close of a detached mount the daemon does not hear. But the kernel then lets it go
    # at once, and one that was cut off it keeps until its users are gone.
    if own.is_shown():
        return True
    with trio.move_on_after(_STOP_SECONDS if open_files else 0):
        while own.is_known():
            await trio.sleep(_STOP_SECONDS / 100)
        return False
    return open_files > 0


class _Service:
    # What a service manager is told of a mount.

    def __init__(self, operations: Operations, notifier: Notifier, own: OwnMount | None) -> None:
        self._operations = operations
        self._own = own
        self._notifier = notifier
        self._is_stopping = False
        self.is_ending = False  # at once, if need be by an abort of our own

    def stop(self) -> None:
        self._is_stopping = True
        self._notifier.tell("STOPPING=1", f"STATUS={self.status()}")

    def status(self) -> str:
        files = counted(self._operations.open_files, "file")
        if self._is_stopping:
            also = len(self._own.elsewhere()) if self._own else 0
            mounts = f" and {counted(also, 'other mount')}" if also else ""
            return f"detached; {files}{mounts} open, serving on until the last is closed"
        store = self._operations.tree.store
        shown = "one image" if store is None else counted(len(store.tags()), "snapshot")
        return f"serving {shown}, {files} open"

    async def tell_on(self) -> None:
        said = ""
        while True:
            if (status := self.status()) != said:
                self._notifier.tell(f"STATUS={status}")
                said = status
            await trio.sleep(LOOK_SECONDS)


async def _say_ready(
    operations: Operations,
    own: OwnMount | None,
    loop: ReadLoop,
    ready: Callable[[], None],
    wanted: Tuning,
    up: trio.Event,
) -> None:
    # The answer to the first request undoes what was set before it.
    await operations.answers.wait()
    operations.metrics.fast_loop = loop.check()
    readahead = await in_thread(tuning.tune, own.device, wanted) if own is not None else None
    operations.observer.ready(readahead)
    log.info("ready")
    up.set()
    ready()


async def _watch_source(store: Store) -> None:
    said = ""
    while True:
        started = trio.current_time()
        await trio.sleep(LOOK_SECONDS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_say_if_slow, store)
            said = await _look(store, said)
            nursery.cancel_scope.cancel()
        # A look at a very large directory must not keep a processor busy.
        await trio.sleep(max(0.0, trio.current_time() - started - 2 * LOOK_SECONDS))


async def _look(store: Store, said: str) -> str:
    # What was wrong with it, which is not said again.
    try:
        await in_thread(store.look)
    except DiffMergeError as error:
        if str(error) != said:
            stays = "what was shown stays" if store.tags() else "nothing is shown"
            log.warning("%s until this is mended: %s", stays, error)
        return str(error)
    except Exception:
        log.exception("looking over the source failed: this is a bug")
        return said
    return ""


async def _say_if_slow(store: Store) -> None:
    started = trio.current_time()
    await trio.sleep(SLOW_SECONDS)
    log.warning(
        "%s: looking over it takes longer than %g s; changes show when it is done; does some"
        " storage in it hang?",
        store.root,
        SLOW_SECONDS,
    )
    try:
        await trio.sleep_forever()
    finally:
        log.info("%s: looking over it took %.0f s", store.root, trio.current_time() - started)


async def _watch_signals(
    operations: Operations,
    own: OwnMount | None,
    nursery: trio.Nursery,
    early: Sequence[int],
    service: _Service,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(*_ending_signals()) as signals:
        for number in early:
            signal.raise_signal(number)
        task_status.started()
        asked = False
        async for number in signals:
            name = signal.Signals(number).name
            if asked:
                service.is_ending = True
                log.info("%s again: ending at once, %d files open", name, operations.open_files)
                # While requests are still answered: a push may wait for a page that one of them
                # brings, where no signal reaches it.
                with trio.move_on_after(3 * _STOP_SECONDS):
                    await in_thread(operations.observer.stop, _STOP_SECONDS)
                    if own is not None:
                        await in_thread(own.detach)
                # Requests that are being answered are not waited for: their storage may hang.
                pyfuse3.terminate()
                nursery.cancel_scope.cancel()
                return
            asked = True
            if own is not None:
                nursery.start_soon(_detach, own, name, operations)
            service.stop()


async def _detach(own: OwnMount, name: str, operations: Operations) -> None:
    # Said before it is done: with nothing open that is the end.
    if not await in_thread(own.obstacle):
        others = own.elsewhere()
        log.info(
            "%s: detached; %d files are open%s, serving on until the last is closed%s",
            name,
            operations.open_files,
            f" and it is mounted on {', '.join(others)} too" if others else "",
            " and unmounted" if others else "",
        )
    said = ""
    while obstacle := await in_thread(own.detach):
        if obstacle != said:
            log.warning(
                "%s: not detached: %s; that is tried again, %d files are open, and a second signal"
                " ends it at once",
                name,
                obstacle,
                operations.open_files,
            )
        said = obstacle
        await trio.sleep(LOOK_SECONDS)
    for place in await in_thread(in_other_namespaces, own.device, own.source):
        log.info("%s: still mounted on %s, and served on until that is unmounted", name, place)
