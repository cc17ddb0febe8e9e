"""Start a mount in the foreground or background, and report the result."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec

from diffmergefs.cli import BUG, logs
from diffmergefs.cli.logqueue import QueuedHandler
from diffmergefs.cli.output import diagnostic, print_diagnostic
from diffmergefs.cli.usage import error_line
from diffmergefs.core import STATUS_FOLDER
from diffmergefs.core.errors import (
    DiffMergeError,
    FileAccessError,
    MissingExtraError,
    MountAbortedError,
    MountFailedError,
    MountTimeoutError,
)
from diffmergefs.fuse.access import view_access
from diffmergefs.fuse.handles import ObservedMount, Observer
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.fuse.served import Store, wait_until_stable
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.prefetch.adviser import Adviser
from diffmergefs.prefetch.prefetcher import Prefetcher
from diffmergefs.prefetch.push import Notify
from diffmergefs.prefetch.record import WorkingSets
from diffmergefs.prefetch.recorder import Recorder
from diffmergefs.stores.catalog import Catalog
from diffmergefs.stores.remarks import remarks, require_store
from diffmergefs.system import daemon, mounted
from diffmergefs.system import mountpoint as mountpoints
from diffmergefs.system.daemon import Caller, Notifier
from diffmergefs.system.installation import install_command, missing_package
from diffmergefs.system.mounttable import FILESYSTEM_TYPE, Mount, mount_entry, resolved
from diffmergefs.system.tuning import Tuning

log = logging.getLogger("diffmergefs")

_STDERR = 2


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to mount, where and how. All paths are absolute."""

    source: str | None
    layers: tuple[str, ...]
    mountpoint: str
    policy: TrustPolicy
    layout: str | None
    suffix: str | None
    allow_other: bool
    open_rw: bool
    options: tuple[str, ...]
    tuning: Tuning
    prefetch: str  # or 'record'
    working_set_dir: str | None
    drop_behind: bool
    fast_loop: bool
    watchdog: float

    @property
    def name(self) -> str:
        """The source in the mount table."""
        return self.source or self.layers[0]


def serve_in_front(request: Request, handler: QueuedHandler, level: int, notifier: Notifier) -> int:
    """Mount, and serve in this process until the mount ends. Return the exit code.

    Log records from `level` on go to `handler`. If that writes to stderr, which may block, a
    DiffMergeError goes there too: as a line, or as a log record if stderr has priorities or JSON.
    Otherwise it is raised, except for an error that ends a mount that was up.
    """
    logs.log_to({handler: level})
    with contextlib.closing(handler):
        try:
            _serve(
                request,
                functools.partial(notifier.notify, "READY=1"),
                notifier=notifier,
                before_servers=handler.rest,
            )
        except MountAbortedError as error:
            return error.exit_code  # it was logged
        except DiffMergeError as error:
            if handler.fd != _STDERR:
                raise
            if isinstance(handler.formatter, logs.Lines):
                handler.write_line(diagnostic(error_line(error)))
            else:
                # A program that reads priorities or JSON expects every line in that form.
                log.error("%s", error_line(error))
            return error.exit_code
    return 0


def _serve(
    request: Request,
    ready: Callable[[], None],
    leave_caller: Callable[[], None] = lambda: None,
    *,
    notifier: Notifier | None = None,
    before_servers: Callable[[], None] = lambda: None,
    tell: Callable[[str], object] = log.info,
) -> None:
    # Imported here, because everything else works without libfuse.
    try:
        from diffmergefs.fuse.mounting import session_options
        from diffmergefs.fuse.session import Session
    except ImportError as error:
        raise MountFailedError(
            f"{request.mountpoint}: cannot be mounted: pyfuse3 cannot be imported ({error});"
            f" install it: {install_command(missing_package(error) or 'pyfuse3')}"
        ) from error
    # Otherwise who reads the metrics would be the first to notice: the import is slow and waits.
    if find_spec("prometheus_client") is None:
        raise MissingExtraError(
            "the metrics of a mount need the Python package prometheus_client; install it:"
            f" {install_command('prometheus_client')}"
        )
    real = mountpoints.check_mountpoint(
        request.mountpoint, request.source, request.layers, request.policy.allow_outside
    )
    options = session_options(
        request.name, request.options, allow_other=request.allow_other, open_rw=request.open_rw
    )
    if request.policy.verify == "no":
        log.warning(
            "%s: seals and hashes of parents are not verified (--verify=no): guests get wrong"
            " bytes from a wrong file",
            request.name,
        )
    observe = functools.partial(_observer, _working_sets(request), request.prefetch)
    if request.source is None:
        tree = Tree(real, explicit=_explicit_image(request), open_rw=request.open_rw)
    else:
        store = Store(
            request.source,
            request.policy,
            layout=request.layout,
            suffix=request.suffix,
        )
        wait_until_stable(store)
        _tell_what_is_there(store.seen.catalog, request.layout, tell)
        tree = Tree(real, store, open_rw=request.open_rw)
    Session(
        tree=tree,
        mountpoint=real,
        options=options,
        ready=ready,
        notifier=notifier or Notifier(),
        tuning=request.tuning,
        observe=observe,
        drop_behind=request.drop_behind,
        fast_loop=request.fast_loop,
        leave_caller=leave_caller,
        before_servers=before_servers,
        watchdog=request.watchdog,
    ).serve()


def _do_nothing() -> None:
    pass


def _tell_what_is_there(
    catalog: Catalog, layout: str | None, tell: Callable[[str], object]
) -> None:
    require_store(catalog)
    for line in remarks(catalog, layout):
        if catalog.snapshots:
            tell(line)
        else:
            log.warning("%s", line)


def _working_sets(request: Request) -> WorkingSets | None:
    if request.prefetch == "no":
        return None
    try:
        sets = WorkingSets(request.working_set_dir, request.policy.state_dir)
        if request.prefetch == "record":
            sets.prepare()
    except FileAccessError as error:
        if request.prefetch == "record":
            raise
        log.info("no prefetch: %s", error)
        return None
    return sets


def _observer(sets: WorkingSets | None, how: str, mount: ObservedMount) -> Observer:
    if sets is not None and how == "record":
        return Recorder(sets)
    if sets is None or mount.device is None:
        return Observer()  # --prefetch=no, or the reason was logged
    adviser = Adviser(os.makedev(*map(int, mount.device.split(":"))), mount.path_of)
    if how == "fadvise":
        return Prefetcher(sets, adviser)
    if not mount.is_guarded():
        log.info(
            "--prefetch=fadvise replaces notify: this kernel gives no server the requests of one"
            " that died, and the connection to it cannot be ended, so a push could leave its"
            " readers waiting"
        )
        return Prefetcher(sets, adviser)
    return Prefetcher(sets, Notify(mount.store_pages, mount.is_guarded), mount.abort)


def _explicit_image(request: Request) -> OpenImage:
    base, *diffs = request.layers
    if os.path.basename(base) == STATUS_FOLDER:
        raise MountFailedError(
            f"{base}: {STATUS_FOLDER!r} is the mount's own directory; give the base, or a link to"
            " it, another name"
        )
    image = open_chain(base, diffs, request.policy)
    for line in (*image.overridden, *image.hints):
        log.warning("%s", line)
    try:
        access = view_access(image.view.layers)
    except OSError as error:
        raise FileAccessError(
            f"{error.filename or base}: {error.strerror} while finding out who may read it"
        ) from error
    return OpenImage.of(image.view, os.path.basename(base), access)


def serve_in_background(
    request: Request, handler: logging.Handler, level: int, timeout: float, kept: Collection[int]
) -> int:
    """Mount, and leave a daemon that serves and logs to `handler`. Return the exit code.

    The daemon keeps the descriptors 0 to 2 and those in `kept`. Returns when the mount answers, or
    when the daemon has failed, after printing the reason. Raises MountTimeoutError if neither
    happens within `timeout` seconds; then no mount and no daemon remain.
    """

    def child(caller: Caller) -> int:
        logging.raiseExceptions = False  # a log that cannot be written is no error
        # Warnings at the start go to the caller's terminal too.
        logs.log_to({logs.caller_handler(): logging.WARNING, handler: level})
        with contextlib.closing(handler):
            return serve(caller)

    def serve(caller: Caller) -> int:
        try:
            rest = handler.rest if isinstance(handler, QueuedHandler) else _do_nothing
            _serve(request, caller.ready, caller.leave, before_servers=rest, tell=tell)
        except MountAbortedError as error:
            return error.exit_code  # it was logged
        except DiffMergeError as error:
            log.error("%s", error_line(error))
            return error.exit_code
        except Exception:
            log.exception("the daemon failed: this is a bug")
            return BUG
        return 0

    def tell(line: str) -> None:
        log.info("%s", line)
        print_diagnostic(line)

    before = _mounted_at(request)
    try:
        outcome = daemon.start(child, timeout, kept)
    except BaseException:
        _remove_leftover(request, before)
        raise
    if outcome.status is None:
        _remove_leftover(request, before)
        raise MountTimeoutError(
            f"{request.mountpoint}: the mount did not answer within {timeout:g} s; is the storage"
            " of SOURCE slow? Increase --timeout, or use -f to see the log"
        )
    lines = [line.removeprefix(diagnostic("")) for line in outcome.text.splitlines()]
    if outcome.status == 0:
        print_diagnostic(*lines)
        os.stat(request.mountpoint)
    elif outcome.status == BUG:
        with contextlib.suppress(OSError):
            print(outcome.text, end="", file=sys.stderr, flush=True)
    else:
        # What came before the reason of the failure does not matter any more.
        print_diagnostic(lines[-1] if lines else f"the daemon ended with status {outcome.status}")
    return outcome.status if outcome.status >= 0 else MountFailedError.exit_code


def _mounted_at(request: Request) -> Mount | None:
    return mount_entry(resolved(request.mountpoint))


def _remove_leftover(request: Request, before: Mount | None) -> None:
    # Detach only the child's mount, not one that was there before.
    known = _mounted_at(request)
    if known is None or known == before:
        return
    if known.kind == FILESYSTEM_TYPE and known.source == request.name:
        mounted.detach(known.path)
