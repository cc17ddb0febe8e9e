"""`mount` and `umount`."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import click
from click.shell_completion import CompletionItem

from diffmergefs.cli import logs
from diffmergefs.cli.common import (
    PATH,
    layer_options,
    outside_option,
    require_one_source,
    talk,
    trust_options,
    working_set_dir_option,
)
from diffmergefs.errors import (
    DiffMergeError,
    FileAccessError,
    MountFailedError,
    MountTimeoutError,
)
from diffmergefs.images import open_chain
from diffmergefs.layouts.catalog import LAYOUTS
from diffmergefs.lease import Leases
from diffmergefs.logformat import Lines, printable
from diffmergefs.serving import daemon
from diffmergefs.serving import mountpoint as mountpoints
from diffmergefs.serving.access import view_access
from diffmergefs.serving.notify import JOURNAL, Notifier, is_journal
from diffmergefs.serving.store import OpenImage, Store
from diffmergefs.serving.tree import Tree
from diffmergefs.serving.tuning import MAX_BACKGROUND, READAHEAD_KIB, Tuning
from diffmergefs.trust import TrustPolicy
from diffmergefs.workingsets.workingset import WorkingSets

log = logging.getLogger("diffmergefs")

_BARE_PREFETCH = "--prefetch=notify"


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
    tuning: Tuning
    prefetch: str  # or 'record'
    working_set_dir: str | None
    drop_behind: bool

    @property
    def name(self) -> str:
        """What the mount table shows as the mounted thing."""
        return self.source or self.layers[0]


def split_options(options: Iterable[str]) -> list[str]:
    """The single options of several `-o`, without `ro`, which a view is anyway.

    A comma that belongs to a value is written as `\\,` and a backslash before it as `\\\\`.
    """
    pieces = re.findall(r"(?:\\.|[^,])+", ",".join(options))
    found = (re.sub(r"\\([\\,])", r"\1", piece) for piece in pieces)
    return [option for option in found if option != "ro"]


def option_name(option: str) -> str:
    """The name of the long option that a mount option stands for."""
    return option.partition("=")[0].replace("_", "-")


class MountCommand(click.Command):
    """Takes its long options as -o options too, as fstab has them: `-o open_rw,page_size=16384`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # As in GNU programs the value of an option that may lack one comes with `=`: what follows
        # a bare --prefetch is an operand.
        args = [_BARE_PREFETCH if arg == "--prefetch" else arg for arg in args]
        rest = super().parse_args(ctx, args)
        options = split_options(ctx.params["options"])
        names = self.long_names()
        mine = [option for option in options if option_name(option) in names]
        ctx.params["options"] = tuple(o for o in options if o not in mine)
        self._take(ctx, mine)
        return rest

    def long_names(self) -> set[str]:
        """The names that are mount options too."""
        names = {name for param in self.params for name in param.opts if name.startswith("--")}
        return {name[2:] for name in names} - {"help"}

    def _take(self, ctx: click.Context, options: list[str]) -> None:
        arguments = []
        for option in options:
            _, equals, value = option.partition("=")
            argument = f"--{option_name(option)}{equals}{value}"
            arguments.append(_BARE_PREFETCH if argument == "--prefetch" else argument)
        values, _, _ = self.make_parser(ctx).parse_args(arguments)
        for param in self.params:
            if isinstance(param, click.Option) and param.name in values:
                if param.multiple:
                    values[param.name] = [*ctx.params[param.name], *values[param.name]]
                param.handle_parse_result(ctx, values, [])


def _complete_path(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    # By the shell. (A type `click.Path` would ask what is mounted there, and that may hang.)
    return [CompletionItem(incomplete, type="file")]


def _complete_options(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    before, comma, begun = incomplete.rpartition(",")
    names = [
        name[2:].replace("-", "_") + ("" if option.is_flag else "=")
        for option in context.command.params
        if isinstance(option, click.Option)
        for name in option.opts
        if name.startswith("--") and name != "--help"
    ]
    return [before + comma + name for name in sorted(names) if name.startswith(begun)]


@click.command(cls=MountCommand)
@click.argument(
    "operands",
    nargs=-1,
    required=True,
    metavar="[SOURCE] MOUNTPOINT",
    shell_complete=_complete_path,
)
@layer_options
@click.option("-f", "--foreground", is_flag=True, help="Stay in front and log to stderr.")
@click.option(
    "-o",
    "options",
    multiple=True,
    metavar="OPT[,OPT...]",
    shell_complete=_complete_options,
    help="Mount options.",
)
@click.option("--allow-other", is_flag=True, help="Let other users in, by the permission bits.")
@click.option(
    "--open-rw",
    is_flag=True,
    help="For programs that open read-write even for a private mapping (QEMU before 8.2). Writes"
    " and shared writable mappings still fail; each such mapping drops the image's cached pages.",
)
@click.option(
    "--drop-behind",
    is_flag=True,
    help="Drop the layers' pages from the page cache once they were served: the views keep them.",
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
@click.option(
    "--log-format",
    type=click.Choice(logs.FORMATS),
    default="auto",
    show_default=True,
    help="Records as lines with date and level (plain), as lines with <N> in front, N the priority"
    " (journald), or as JSON. auto: journald where the log goes to the journal, else plain.",
)
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
@click.option(
    "--record",
    is_flag=True,
    help="Record which pages each opened image is asked for first, in order, for --prefetch.",
)
@click.option(
    "--prefetch",
    type=click.Choice(["notify", "fadvise", "no"]),
    metavar="[=notify|fadvise|no]",
    help="Bring the recorded pages of an image into the page cache when it is opened: by handing"
    " them to the kernel ('notify', the default where there is a record), by a child process that"
    " has the kernel read them ('fadvise'), or not at all.",
)
@working_set_dir_option
@click.option(
    "--readahead",
    type=click.IntRange(4, 65536),
    metavar="KIB",
    help=f"How far the kernel reads ahead, by default {READAHEAD_KIB} KiB; takes root.",
)
@click.option(
    "--max-background",
    type=click.IntRange(1, 65535),
    metavar="N",
    help="How many requests that nobody waits for yet are under way at once, by default"
    f" {MAX_BACKGROUND}.",
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
    drop_behind: bool,
    layout: str | None,
    suffix: str | None,
    timeout: float,
    log_file: str | None,
    log_format: str,
    verbose: bool,
    verify: str,
    record: bool,
    prefetch: str | None,
    working_set_dir: str | None,
    readahead: int | None,
    max_background: int | None,
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
      diffmergefs mount --record /srv/snapshots /mnt/views
    """
    if len(operands) > 2:
        raise click.UsageError("give at most SOURCE and MOUNTPOINT")
    source = os.path.abspath(operands[0]) if len(operands) == 2 else None
    require_one_source(source, base, diffs, "SOURCE", policy)
    if record and prefetch not in (None, "no"):
        raise click.UsageError(
            f"--record sees no touch of what --prefetch={prefetch} has brought; leave one out"
        )
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
        Tuning(readahead, max_background, recording=record),
        "record" if record else prefetch or "notify",
        working_set_dir,
        drop_behind,
    )
    level = logging.DEBUG if verbose else logging.INFO
    notifier = Notifier.from_environment(os.environ)
    stream = os.environ.pop(JOURNAL, None)
    if foreground:
        if log_file:
            handler = logs.file_handler(log_file, log_format)
        else:
            handler = logs.stderr_handler(log_format, to_journal=is_journal(2, stream))
        return _serve_in_front(request, handler, level, notifier)
    logs.log_to(logs.stderr_handler("plain"), level)
    serve = functools.partial(_serve, request)
    handler = _background_handler(log_file, log_format)
    return _serve_in_background(request, serve, handler, level, timeout)


def _serve_in_front(
    request: Request, handler: logging.Handler, level: int, notifier: Notifier
) -> int:
    logs.log_to(handler, level)
    try:
        _serve(request, functools.partial(notifier.tell, "READY=1"), notifier)
    except DiffMergeError as error:
        if isinstance(handler, logging.FileHandler) or isinstance(handler.formatter, Lines):
            raise
        # Whoever reads stderr by priorities or as JSON finds it there.
        log.error("%s", error)
        return error.exit_code
    return 0


def _serve(request: Request, ready: Callable[[], None], notifier: Notifier | None = None) -> None:
    # Imported here: all else works where libfuse is missing.
    try:
        from diffmergefs.serving import mount as mounts
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
    restoring = None
    if sets := _working_sets(request):
        restoring = mounts.Restoring(sets, cast(Any, request.prefetch))
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
    mounts.serve(
        tree,
        real,
        options,
        ready,
        leases,
        notifier or Notifier(),
        request.tuning,
        restoring,
        drop_behind=request.drop_behind,
    )


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
        log.info("nothing is prefetched: %s", error)
        return None
    return sets


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
        logs.log_to(logs.stderr_handler("plain"), logging.WARNING, handler, level)
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


def _background_handler(log_file: str | None, log_format: str) -> logging.Handler:
    if log_file:
        return logs.file_handler(log_file, log_format)
    handler = logs.syslog_handler(log_format)
    if handler is None:
        talk(
            f"no syslog answers at {logs.SYSLOG}, so the daemon's log is lost; keep it with"
            " --log FILE"
        )
    return handler or logging.NullHandler()


@click.command()
@click.argument("mountpoint", type=PATH)
@click.option("--lazy", is_flag=True, help="Detach it although files are open; they stay served.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT; refused while files are open, unless --lazy.

    The refusal names the processes that have them open or mapped, as far as they can be seen.

    \b
    Example:
      diffmergefs umount /mnt/views
    """
    mountpoints.unmount(mountpoint, lazy=lazy)
