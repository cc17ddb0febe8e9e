"""`mount`, whose long options are also mount options (`-o`)."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from typing import Any

import click

from diffmergefs.cli import logs
from diffmergefs.cli.inputs import require_one_source
from diffmergefs.cli.mountoptions import arguments_of, sort_options, unescaped
from diffmergefs.cli.options import (
    MOUNTPOINT,
    PATH,
    OptionalValue,
    Size,
    layer_options,
    layout_options,
    log_format_option,
    store_options,
    strict_option,
    trust_options,
    verify_level_option,
    with_values,
    working_set_dir_option,
)
from diffmergefs.cli.output import print_diagnostic
from diffmergefs.cli.start import Request, serve_in_background, serve_in_front
from diffmergefs.cli.usage import Verb
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.system.daemon import JOURNAL, Notifier, handed_over, is_journal, named_in
from diffmergefs.system.mountpoint import require_answer
from diffmergefs.system.tuning import MAX_BACKGROUND, READAHEAD_KIB, Tuning


class MountCommand(Verb):
    """Accepts its long options as mount options too, as in `-o open_rw,page_size=16384`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Also read this command's own options from -o."""
        rest = super().parse_args(ctx, with_values(self, args))
        try:
            found = sort_options(ctx.params["options"], self.long_options())
        except click.UsageError as error:
            error.ctx = ctx
            raise
        ctx.params["options"] = tuple(map(unescaped, found.libfuse))
        self._take(ctx, arguments_of(found.ours))
        return rest

    def long_options(self) -> dict[str, click.Option]:
        """The long options, which are mount options too, by name."""
        return {
            name[2:]: option
            for option in self.params
            if isinstance(option, click.Option)
            for name in option.opts
            if name.startswith("--")
        }

    def _take(self, ctx: click.Context, arguments: list[str]) -> None:
        values, _, _ = self.make_parser(ctx).parse_args(with_values(self, arguments))
        for param in self.params:
            if isinstance(param, click.Option) and param.name in values:
                if param.multiple:
                    values[param.name] = [*ctx.params[param.name], *values[param.name]]
                param.handle_parse_result(ctx, values, [])


def complete_options(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """The completions of the last option in an `-o`."""
    before, comma, begun = incomplete.rpartition(",")
    options = mount.long_options().items()
    names = [name.replace("-", "_") + end for name, option in options for end in _ends(option)]
    return [before + comma + name for name in sorted(names) if name.startswith(begun)]


def _ends(option: click.Option) -> list[str]:
    if isinstance(option, OptionalValue):
        return ["", "="]
    return [""] if option.is_flag else ["="]


@click.command(cls=MountCommand)
@click.argument(
    "operands",
    nargs=-1,
    type=MOUNTPOINT,
    metavar="[SOURCE] MOUNTPOINT",
)
@layer_options
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground and log to stderr.")
@click.option(
    "-o",
    "options",
    multiple=True,
    metavar="OPT[,OPT...]",
    shell_complete=complete_options,
    help="Mount options.",
)
@click.option("--allow-other", is_flag=True, help="Allow access by other users.")
@click.option(
    "--open-rw",
    is_flag=True,
    help="For programs that open the file read-write even for a private mapping (QEMU before 8.2)."
    " Writes and shared writable mappings still fail. Each such mapping drops the image's cached"
    " pages.",
)
@click.option(
    "--drop-behind",
    is_flag=True,
    help="Drop the layers' pages from the page cache after serving them. The views keep theirs.",
)
@click.option(
    "--no-fast-loop",
    is_flag=True,
    help="Let pyfuse3 wait for requests in its own way, which needs more CPU for small reads.",
)
@click.option(
    "--watchdog",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Replace the server when it has been stuck for this long. 0: never. A server that waits"
    " for storage is not stuck.",
)
@layout_options
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait until the mount answers.",
)
@click.option("--log", "log_file", type=PATH, metavar="FILE", help="Log to FILE instead of syslog.")
@log_format_option
@click.option("-v", "--verbose", is_flag=True, help="Also log each failed request.")
@verify_level_option("before an image first appears")
@click.option(
    "--record",
    is_flag=True,
    help="Record which pages of each opened image are requested first, for --prefetch.",
)
@click.option(
    "--prefetch",
    cls=OptionalValue,
    bare="notify",
    type=click.Choice(["notify", "fadvise", "no"]),
    metavar="[=notify|fadvise|no]",
    help="Read the recorded pages of an image into the page cache when it is opened. notify (the"
    " default): push them to the kernel. fadvise: let the kernel read them through a child process."
    " no: do not prefetch.",
)
@working_set_dir_option
@click.option(
    "--readahead",
    type=Size(1024, 4, 65536),
    help=f"How far the kernel reads ahead, as in 128K or 1M (default: {READAHEAD_KIB}K). A plain"
    " number is KiB. Needs root.",
)
@click.option(
    "--max-background",
    type=click.IntRange(1, 65535),
    metavar="N",
    help=f"How many background requests the kernel sends at a time (default: {MAX_BACKGROUND}).",
)
@trust_options
@strict_option
@store_options
def mount(
    operands: tuple[str, ...],
    base: str | None,
    diffs: tuple[str, ...],
    foreground: bool,
    no_fast_loop: bool,
    timeout: float,
    log_file: str | None,
    log_format: str,
    verbose: bool,
    verify: str,
    record: bool,
    prefetch: str | None,
    readahead: int | None,
    max_background: int | None,
    policy: TrustPolicy,
    **same: Any,
) -> int:
    """Mount every complete snapshot of SOURCE on MOUNTPOINT, read-only, with merged memory files.

    SOURCE is a forkd store, a directory of numbered layers, or a directory of superserve or Cloud
    Hypervisor snapshots. Changes in it appear within two seconds. With --base and --diff instead of
    SOURCE, MOUNTPOINT has one merged file with the base's name. The command returns when the mount
    answers. Stop it with `diffmergefs umount` or SIGTERM. After SIGTERM, open files are served
    until the last one is closed; a second signal ends the daemon at once.

    The long options work as -o options too, as in -o open_rw,dense,page_size=16384.

    \b
    Examples:
      diffmergefs mount /srv/snapshots /mnt/views
      diffmergefs mount --base mem_file --diff mem_diff /mnt/view
      diffmergefs mount -f --open-rw /srv/snapshots /mnt/views
      diffmergefs mount --record /srv/snapshots /mnt/views
    """
    if not operands or (len(operands) == 1 and base is None and not diffs):
        raise click.UsageError("MOUNTPOINT is missing: the directory to mount on comes last")
    if len(operands) > 2:
        also = "; give one --diff for each file" if diffs else ""
        raise click.UsageError(f"give at most SOURCE and MOUNTPOINT{also}")
    source = operands[0] if len(operands) == 2 else None
    require_one_source(source, base, diffs, "SOURCE", policy)
    if source is not None:
        source = os.path.abspath(source)
        require_answer(source)
    if record and prefetch not in (None, "no"):
        raise click.UsageError(
            f"--record and --prefetch={prefetch} cannot be combined: prefetched pages cause no"
            " requests that could be recorded"
        )
    request = Request(
        source=source,
        layers=tuple(os.path.abspath(path) for path in (base, *diffs) if path),
        mountpoint=os.path.abspath(operands[-1]),
        policy=replace(policy, verify=verify),
        tuning=Tuning(readahead, max_background, recording=record),
        prefetch="record" if record else prefetch or "notify",
        fast_loop=not no_fast_loop,
        **same,  # the options that are named like the fields of a Request
    )
    level = logging.DEBUG if verbose else logging.INFO
    notifier = Notifier(os.environ)
    stream = os.environ.pop(JOURNAL, None)
    handed = handed_over(os.environ)
    if foreground:
        if log_file:
            queued = logs.file_handler(log_file, log_format)
        else:
            queued = logs.stderr_handler(log_format, to_journal=is_journal(2, stream))
        return serve_in_front(request, queued, level, notifier)
    logs.log_to({logs.caller_handler(): level})
    if log_file:
        handler: logging.Handler | None = logs.file_handler(log_file, log_format)
    else:
        handler = logs.syslog_handler(log_format)
    kept = handed | named_in(sys.argv) | (logs.descriptors_of(handler) if handler else set())
    status = serve_in_background(request, handler or logging.NullHandler(), level, timeout, kept)
    if status == 0 and handler is None:
        print_diagnostic(
            f"no syslog answers at {logs.SYSLOG}, so the daemon's log is lost; use --log FILE"
        )
    return status
