"""`mount`."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import replace

import click

from diffmergefs.cli import logs
from diffmergefs.cli.inputs import require_one_source
from diffmergefs.cli.options import (
    MOUNTPOINT,
    PATH,
    OptionalValue,
    layer_options,
    store_options,
    strict_option,
    trust_options,
    with_values,
    working_set_dir_option,
)
from diffmergefs.cli.output import print_diagnostic
from diffmergefs.cli.start import Request, serve_in_background, serve_in_front
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import LAYOUTS
from diffmergefs.system.daemon import handed_over, named_in
from diffmergefs.system.mountpoint import require_answer
from diffmergefs.system.sdnotify import JOURNAL, Notifier, is_journal
from diffmergefs.system.tuning import MAX_BACKGROUND, READAHEAD_KIB, Tuning


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
        rest = super().parse_args(ctx, with_values(self, args))
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
            arguments.append(f"--{option_name(option)}{equals}{value}")
        values, _, _ = self.make_parser(ctx).parse_args(with_values(self, arguments))
        for param in self.params:
            if isinstance(param, click.Option) and param.name in values:
                if param.multiple:
                    values[param.name] = [*ctx.params[param.name], *values[param.name]]
                param.handle_parse_result(ctx, values, [])


def complete_options(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """What the shell offers for the last option of an `-o`."""
    before, comma, begun = incomplete.rpartition(",")
    names = [
        name[2:].replace("-", "_") + end
        for option in context.command.params
        if isinstance(option, click.Option)
        for name in option.opts
        if name.startswith("--") and name != "--help"
        for end in _ends(option)
    ]
    return [before + comma + name for name in sorted(names) if name.startswith(begun)]


def _ends(option: click.Option) -> list[str]:
    if isinstance(option, OptionalValue):
        return ["", "="]
    return [""] if option.is_flag else ["="]


@click.command(cls=MountCommand)
@click.argument(
    "operands",
    nargs=-1,
    required=True,
    type=MOUNTPOINT,
    metavar="[SOURCE] MOUNTPOINT",
)
@layer_options
@click.option("-f", "--foreground", is_flag=True, help="Stay in front and log to stderr.")
@click.option(
    "-o",
    "options",
    multiple=True,
    metavar="OPT[,OPT...]",
    shell_complete=complete_options,
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
@click.option(
    "--no-fast-loop",
    is_flag=True,
    help="Let pyfuse3 wait for requests in its own way, which takes more CPU time for small reads.",
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
    cls=OptionalValue,
    bare="notify",
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
@strict_option
@store_options
def mount(
    operands: tuple[str, ...],
    base: str | None,
    diffs: tuple[str, ...],
    foreground: bool,
    options: tuple[str, ...],
    allow_other: bool,
    open_rw: bool,
    drop_behind: bool,
    no_fast_loop: bool,
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
    if source is not None:
        require_answer(source)
    if record and prefetch not in (None, "no"):
        raise click.UsageError(
            f"--record sees no touch of what --prefetch={prefetch} has brought; leave one out"
        )
    request = Request(
        source=source,
        layers=tuple(os.path.abspath(path) for path in (base, *diffs) if path),
        mountpoint=os.path.abspath(operands[-1]),
        policy=replace(policy, verify=verify),
        layout=layout,
        suffix=suffix,
        allow_other=allow_other,
        open_rw=open_rw,
        options=options,
        tuning=Tuning(readahead, max_background, recording=record),
        prefetch="record" if record else prefetch or "notify",
        working_set_dir=working_set_dir,
        drop_behind=drop_behind,
        fast_loop=not no_fast_loop,
    )
    level = logging.DEBUG if verbose else logging.INFO
    notifier = Notifier.from_environment(os.environ)
    stream = os.environ.pop(JOURNAL, None)
    handed = handed_over(os.environ)
    if foreground:
        if log_file:
            queued = logs.file_handler(log_file, log_format)
        else:
            queued = logs.stderr_handler(log_format, to_journal=is_journal(2, stream))
        return serve_in_front(request, queued, level, notifier)
    logs.log_to(logs.caller_handler(), level)
    handler = _background_handler(log_file, log_format)
    kept = handed | named_in(sys.argv) | logs.descriptors_of(handler)
    return serve_in_background(request, handler, level, timeout, kept)


def _background_handler(log_file: str | None, log_format: str) -> logging.Handler:
    if log_file:
        return logs.file_handler(log_file, log_format)
    handler = logs.syslog_handler(log_format)
    if handler is None:
        print_diagnostic(
            f"no syslog answers at {logs.SYSLOG}, so the daemon's log is lost; keep it with"
            " --log FILE"
        )
    return handler or logging.NullHandler()
