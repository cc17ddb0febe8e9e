"""`mount` and `umount`."""

from __future__ import annotations

import functools
import logging
import logging.handlers
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import click

from diffmergefs import daemon
from diffmergefs import mountpoint as mountpoints
from diffmergefs.access import view_access
from diffmergefs.catalog import LAYOUTS
from diffmergefs.cli.common import (
    PATH,
    layer_options,
    outside_option,
    printable,
    require_one_source,
    talk,
    trust_options,
)
from diffmergefs.errors import (
    DiffMergeError,
    FileAccessError,
    MountFailedError,
    MountTimeoutError,
)
from diffmergefs.images import open_chain
from diffmergefs.lease import Leases
from diffmergefs.store import OpenImage, Store
from diffmergefs.tree import Tree
from diffmergefs.trust import TrustPolicy

log = logging.getLogger("diffmergefs")

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_SYSLOG = "/dev/log"


class _Lines(logging.Formatter):
    # A record is one line, whatever names are in it; a traceback's lines are set in, so that none
    # of them can pass for a record.

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"    {printable(line)}" for line in lines)


class _SysLogHandler(logging.handlers.SysLogHandler):
    # A syslog that takes nothing off its socket must not hold up the daemon: then lines are lost.

    def _connect_unixsocket(self, address: str) -> None:
        super()._connect_unixsocket(address)  # type: ignore[misc]
        self.socket.setblocking(False)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Request:
    """What is to be mounted where and how; all paths absolute."""

    source: str | None
    layers: tuple[str, ...]
    mountpoint: str
    policy: TrustPolicy
    layout: str | None
    suffix: str | None
    allow_other: bool
    open_rw: bool
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the mount table shows as the mounted thing."""
        return self.source or self.layers[0]


def _split_options(options: tuple[str, ...]) -> list[str]:
    # A bare `ro` is what a view is anyway.
    return [option for option in ",".join(options).split(",") if option not in ("", "ro")]


class _MountCommand(click.Command):
    # Takes its long options as -o options too (`-o open_rw,page_size=16384`), as fstab has them.

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        options = _split_options(ctx.params["options"])
        names = self._long_names()
        mine = [o for o in options if o.partition("=")[0].replace("_", "-") in names]
        ctx.params["options"] = tuple(o for o in options if o not in mine)
        self._take(ctx, mine)
        return rest

    def _long_names(self) -> set[str]:
        names = {name for param in self.params for name in param.opts if name.startswith("--")}
        return {name[2:] for name in names} - {"help"}

    def _take(self, ctx: click.Context, options: list[str]) -> None:
        arguments = []
        for option in options:
            name, equals, value = option.partition("=")
            arguments.append(f"--{name.replace('_', '-')}{equals}{value}")
        values, _, _ = self.make_parser(ctx).parse_args(arguments)
        for param in self.params:
            if isinstance(param, click.Option) and param.name in values:
                if param.multiple:
                    values[param.name] = [*ctx.params[param.name], *values[param.name]]
                param.handle_parse_result(ctx, values, [])


@click.command(cls=_MountCommand)
@click.argument("operands", nargs=-1, required=True, metavar="[SOURCE] MOUNTPOINT")
@layer_options
@click.option("-f", "--foreground", is_flag=True, help="Stay in front and log to stderr.")
@click.option("-o", "options", multiple=True, metavar="OPT[,OPT...]", help="Mount options.")
@click.option("--allow-other", is_flag=True, help="Let other users in, by the permission bits.")
@click.option(
    "--open-rw",
    is_flag=True,
    help="For programs that open read-write even for a private mapping (QEMU before 8.2). Writes"
    " and shared writable mappings still fail; each such mapping drops the image's cached pages.",
)
@click.option("--layout", type=click.Choice(LAYOUTS), help="What SOURCE holds, if it is unclear.")
@click.option("--suffix", help="The suffix of numbered memory files (.mem).")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait at most until the mount answers.",
)
@click.option("--log", "log_file", type=PATH, metavar="FILE", help="Log to FILE, not to syslog.")
@click.option("-v", "--verbose", is_flag=True, help="Log each failed request too.")
@click.option(
    "--verify",
    type=click.Choice(["no", "pins", "full"]),
    default=TrustPolicy.verify,
    show_default=True,
    help="Compare seals and parents' recorded hashes (pins) with the files before an image is"
    " shown: each once for a file, and remembered ('pins'), all of them anew ('full'), or"
    " not at all ('no': the guest may get wrong bytes).",
)
@trust_options
@outside_option
def mount(
    operands: tuple[str, ...],
    base: str | None,
    diffs: tuple[str, ...],
    foreground: bool,
    options: tuple[str, ...],
    allow_other: bool,
    open_rw: bool,
    layout: str | None,
    suffix: str | None,
    timeout: float,
    log_file: str | None,
    verbose: bool,
    verify: str,
    policy: TrustPolicy,
) -> int:
    """Show every complete snapshot of SOURCE under MOUNTPOINT, its memory file merged, read-only.

    SOURCE is a forkd store, a directory of numbered layers, or of superserve's or Cloud
    Hypervisor's snapshots; changes in it show within two seconds. With --base and --diff instead of
    SOURCE, one merged file, named like the base, is shown. The command returns when the mount
    answers. Stop it with `diffmergefs umount` or SIGTERM: then open files are served on until the
    last is closed; a second signal ends it at once.

    The long options work as -o options too, as in -o open_rw,dense,page_size=16384.

    \b
    Examples:
      diffmergefs mount /srv/snapshots /mnt/views
      diffmergefs mount --base mem_file --diff mem_diff /mnt/view
      diffmergefs mount -f --open-rw /srv/snapshots /mnt/views
    """
    if len(operands) > 2:
        raise click.UsageError("give at most SOURCE and MOUNTPOINT")
    source = os.path.abspath(operands[0]) if len(operands) == 2 else None
    require_one_source(source, base, diffs, "SOURCE", policy)
    request = Request(
        source,
        tuple(os.path.abspath(path) for path in (base, *diffs) if path),
        os.path.abspath(operands[-1]),
        replace(policy, verify=verify),
        layout,
        suffix,
        allow_other,
        open_rw,
        options,
    )
    level = logging.DEBUG if verbose else logging.INFO
    _log_to(logging.StreamHandler(), level)
    serve = functools.partial(_serve, request)
    if foreground:
        if log_file:
            _log_to(_file_handler(log_file), level)
        serve(lambda: None)
        return 0
    return _serve_in_background(request, serve, _background_handler(log_file), level, timeout)


def _serve(request: Request, ready: Callable[[], None]) -> None:
    # Imported here: all else works where libfuse is missing.
    try:
        from diffmergefs import mount as mounts
    except ImportError as error:
        raise MountFailedError(
            f"pyfuse3 cannot be used ({error}); install libfuse3-dev and pyfuse3"
        ) from error
    real = mountpoints.check_mountpoint(
        request.mountpoint, request.source, request.layers, request.policy.allow_outside
    )
    options = mounts.session_options(
        request.name, request.options, allow_other=request.allow_other, open_rw=request.open_rw
    )
    if request.policy.verify == "no":
        log.warning(
            "%s: neither seals nor parents' hashes are compared with the files (--verify=no):"
            " a wrong file shows as wrong bytes in guests",
            request.name,
        )
    leases = Leases()
    if request.source is None:
        tree = Tree(real, explicit=_explicit_image(request, leases), open_rw=request.open_rw)
    else:
        store = Store(
            request.source,
            request.policy,
            layout=request.layout,
            suffix=request.suffix,
            leases=leases,
        )
        mounts.settle(store)
        tree = Tree(real, store, open_rw=request.open_rw)
    mounts.serve(tree, real, options, ready, leases)


def _explicit_image(request: Request, leases: Leases) -> OpenImage:
    base, *diffs = request.layers
    image = open_chain(base, diffs, request.policy, leases)
    for line in image.overridden:
        log.warning("%s", line)
    return OpenImage.of(image, os.path.basename(base), view_access(image.view.layers, "/"))


def _serve_in_background(
    request: Request,
    serve: Callable[[Callable[[], None]], None],
    handler: logging.Handler,
    level: int,
    timeout: float,
) -> int:
    def child(ready: Callable[[], None]) -> int:
        logging.raiseExceptions = False  # a log that cannot be written is no reason to complain
        # Warnings at the start are for the caller's terminal, everything is for the log.
        _log_to(logging.StreamHandler(), logging.WARNING, handler, level)
        try:
            serve(ready)
        except DiffMergeError as error:
            log.error("%s", error)
            print(printable(str(error)), file=sys.stderr)
            return error.exit_code
        except Exception:
            log.exception("the daemon failed: this is a bug")
            return 70
        return 0

    before = _mounted_at(request)
    try:
        outcome = daemon.start(child, timeout)
    except BaseException:
        _remove_leftover(request, before)
        raise
    if outcome.status is None:
        _remove_leftover(request, before)
        raise MountTimeoutError(
            f"{request.mountpoint}: the mount did not answer within {timeout:g} s; is the storage"
            " of SOURCE slow? --timeout waits longer, -f shows what it does"
        )
    lines = outcome.text.splitlines()
    if outcome.status != 0:
        # What libfuse and its helper say on stderr is the reason of the failure that follows.
        reasons = [line for line in lines[:-1] if line.startswith(("fuse: ", "fusermount3: "))]
        last = lines[-1] if lines else f"the daemon ended with status {outcome.status}"
        talk(" ".join([last, *(f"({reason})" for reason in reasons)]))
        return outcome.status if outcome.status > 0 else MountFailedError.exit_code
    for line in lines:
        talk(line)
    os.stat(request.mountpoint)
    return 0


def _mounted_at(request: Request) -> mountpoints.MountEntry | None:
    return mountpoints.mount_entry(mountpoints.resolved(request.mountpoint))


def _remove_leftover(request: Request, before: mountpoints.MountEntry | None) -> None:
    # The child's own, and not one that stood there before.
    known = _mounted_at(request)
    if known is None or known == before:
        return
    if known.kind == mountpoints.FILESYSTEM_TYPE and known.source == request.name:
        mountpoints.detach(known.path)


def _background_handler(log_file: str | None) -> logging.Handler:
    if log_file:
        return _file_handler(log_file)
    # The handler itself takes a missing syslog in silence, and then complains of each line.
    if not os.path.exists(_SYSLOG):
        talk(
            f"no syslog answers at {_SYSLOG}, so the daemon's log is lost; keep it with --log FILE"
        )
        return logging.NullHandler()
    handler = _SysLogHandler(_SYSLOG, facility=_SysLogHandler.LOG_DAEMON)
    handler.ident = "diffmergefs: "
    handler.setFormatter(_Lines())
    return handler


def _file_handler(path: str) -> logging.Handler:
    try:
        handler = logging.FileHandler(path, errors="backslashreplace")
    except OSError as error:
        raise FileAccessError(f"{path}: cannot log there: {error.strerror}") from error
    handler.setFormatter(_Lines(_FORMAT))
    return handler


def _log_to(*handlers_and_levels: logging.Handler | int) -> None:
    pairs = zip(handlers_and_levels[::2], handlers_and_levels[1::2], strict=True)
    for old in list(log.handlers):
        log.removeHandler(old)
    for handler, level in pairs:
        assert isinstance(handler, logging.Handler) and isinstance(level, int)
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(_Lines(_FORMAT))
        handler.setLevel(level)
        log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False


@click.command()
@click.argument("mountpoint", type=PATH)
@click.option("--lazy", is_flag=True, help="Detach it although files are open; they stay served.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT; refused while files are open, unless --lazy.

    \b
    Example:
      diffmergefs umount /mnt/views
    """
    mountpoints.unmount(mountpoint, lazy=lazy)
