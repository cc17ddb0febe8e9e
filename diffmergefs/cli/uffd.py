"""`uffd`: serve an image to Firecracker's page-fault backend."""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import pwd
import threading
from collections.abc import Callable
from dataclasses import replace

import click

from diffmergefs.cli import logs
from diffmergefs.cli.inputs import ImageArguments, image_or_store_options
from diffmergefs.cli.options import (
    PATH,
    Size,
    layout_options,
    log_format_option,
    strict_option,
    verify_level_option,
    working_set_dir_option,
)
from diffmergefs.cli.usage import Verb
from diffmergefs.core.errors import FileAccessError
from diffmergefs.core.extents import PAGE
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.served import LOOK_SECONDS, Store, wait_until_stable
from diffmergefs.prefetch.record import WorkingSets
from diffmergefs.stores.remarks import remarks, require_store
from diffmergefs.system.daemon import JOURNAL, Notifier, is_journal
from diffmergefs.uffd.endpoint import Endpoint, News, SocketDirectory
from diffmergefs.uffd.listener import Listener, Owner
from diffmergefs.uffd.recording import Ahead, Recording
from diffmergefs.uffd.regions import HUGE_PAGE
from diffmergefs.uffd.server import Server
from diffmergefs.uffd.vm import Plan

log = logging.getLogger("diffmergefs")

_AROUND_KIB = 64


def _owner(context: click.Context, parameter: click.Parameter, value: str | None) -> Owner | None:
    if value is None:
        return None
    user, colon, group = value.partition(":")
    try:
        uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid if colon else None
    except KeyError as error:
        raise click.BadParameter(f"{value}: {error.args[0]}") from None
    return Owner(uid, gid)


def _around(context: click.Context, parameter: click.Parameter, value: int) -> int:
    if value < PAGE or value > HUGE_PAGE or value & (value - 1):
        raise click.BadParameter(f"{value} is not a power of two from 4K to 2M")
    return value


@click.command(cls=Verb)
@click.option(
    "--socket",
    "path",
    type=PATH,
    metavar="PATH",
    help="The Unix socket to make, which Firecracker gets as backend_path.",
)
@click.option(
    "--socket-dir",
    "directory",
    type=PATH,
    metavar="DIR",
    help="Serve every snapshot of the directory SOURCE, each at a socket DIR/TAG.sock. Sockets come"
    " and go with the snapshots.",
)
@click.option(
    "--socket-owner",
    "owner",
    metavar="USER[:GROUP]",
    callback=_owner,
    help="The owner of each socket, by names or numbers, as for a jailed Firecracker. The mode is"
    " 0600, with GROUP 0660.",
)
@click.option(
    "--fault-around",
    "around",
    type=Size(),
    default=_AROUND_KIB << 10,
    callback=_around,
    metavar="SIZE",
    help="How many bytes about a fault are copied with it, a power of two from 4K to 2M"
    f" (default: {_AROUND_KIB}K).",
)
@click.option(
    "--on-failure",
    type=click.Choice(["kill", "hang"]),
    default="kill",
    show_default=True,
    help="What happens to a VM that cannot be served any more.",
)
@click.option(
    "--record",
    is_flag=True,
    help="Record which pages are touched first, and copy nothing ahead or about a fault.",
)
@click.option("--no-prefetch", is_flag=True, help="Do not copy the recorded pages ahead.")
@working_set_dir_option
@verify_level_option("at the start, or with --socket-dir when the first VM connects to a snapshot")
@click.option("--log", "log_file", type=PATH, metavar="FILE", help="Log to FILE instead of stderr.")
@log_format_option
@strict_option
@layout_options
@image_or_store_options
def uffd(
    source: ImageArguments,
    path: str | None,
    directory: str | None,
    owner: Owner | None,
    around: int,
    on_failure: str,
    record: bool,
    no_prefetch: bool,
    working_set_dir: str | None,
    verify: str,
    log_file: str | None,
    log_format: str,
    layout: str | None,
    suffix: str | None,
) -> int:
    """Serve IMAGE, or each snapshot of SOURCE, to Firecracker's `Uffd` memory backend.

    Firecracker connects when it loads a snapshot, and gets the merged pages that its guest touches,
    of 4 KiB or 2 MiB. Any number of VMs can be connected. A VM may connect only if its user may
    read each layer. The command stays in the foreground. SIGTERM removes the sockets, and ends the
    command when the last VM has ended; a second signal ends it at once, and VMs that are connected
    hang.

    \b
    Examples:
      diffmergefs uffd /srv/snapshots/pandas --socket /srv/pandas.sock
      diffmergefs uffd --base mem_file --diff mem_diff --socket uffd.sock
      diffmergefs uffd --record /srv/snapshots/pandas --socket /srv/pandas.sock
      diffmergefs uffd /srv/snapshots --socket-dir /srv/pages
    """
    if (path is None) == (directory is None):
        raise click.UsageError("give either --socket PATH or --socket-dir DIR")
    if directory is not None and source.image is None:
        raise click.UsageError("--socket-dir goes with SOURCE, not with --base and --diff")
    for option, value in (("--layout", layout), ("--suffix", suffix)):
        if directory is None and value is not None:
            raise click.UsageError(f"{option} goes with --socket-dir")
    source = replace(source, policy=replace(source.policy, verify=verify))
    stream = os.environ.pop(JOURNAL, None)
    notifier = Notifier(os.environ)
    sets = _working_sets(working_set_dir, source.policy.state_dir, record=record)
    if log_file:
        handler = logs.file_handler(log_file, log_format)
    else:
        handler = logs.stderr_handler(log_format, to_journal=is_journal(2, stream))

    def plan_of(view: MergedView) -> Plan:
        return Plan(
            view,
            PAGE if record else around,
            on_failure == "kill",
            list if sets is None or record or no_prefetch else Ahead(sets, view),
            Recording(sets, view) if record and sets else None,
        )

    with contextlib.closing(handler):
        if directory is not None:
            logs.log_to({handler: logging.INFO})
            _warn_of(verify)
            store = Store(source.image or "", source.policy, layout=layout, suffix=suffix)
            _serve_all(store, directory, owner, plan_of, notifier)
            return 0
        # Nobody closes it: a VM that is left behind must not be killed for that.
        view = source.open().view
        name = os.path.abspath(source.image or source.base or "")
        listener = Listener(path or "", owner)
        logs.log_to({handler: logging.INFO})
        _warn_of(verify)
        plan = plan_of(view)
        server = Server(listener.path, name, view.size, notifier)
        server.change(News([Endpoint(listener, name, lambda: plan)], []))
        try:
            server.serve()
        finally:
            listener.close()
    return 0


def _serve_all(
    store: Store,
    path: str,
    owner: Owner | None,
    plan_of: Callable[[MergedView], Plan],
    notifier: Notifier,
) -> None:
    sockets = SocketDirectory(store, path, owner, plan_of)
    try:
        wait_until_stable(store)
        require_store(store.seen.catalog)
        for line in remarks(store.seen.catalog):
            log.info("%s", line)
        server = Server(sockets.path, store.root, None, notifier, sockets.close)
        server.change(sockets.update())
        watch = threading.Thread(
            target=sockets.watch, args=(LOOK_SECONDS, server.change), daemon=True
        )
        watch.start()
        server.serve()
    finally:
        sockets.close()


def _warn_of(verify: str) -> None:
    if verify == "no":
        log.warning(
            "seals and hashes of parents are not verified (--verify=no): guests get wrong"
            " bytes from a wrong file"
        )


def _working_sets(directory: str | None, state: str | None, *, record: bool) -> WorkingSets | None:
    try:
        sets = WorkingSets(directory, state)
        if record:
            sets.prepare()
    except FileAccessError:
        if record:
            raise
        return None
    return sets
