"""`mount.fuse.diffmergefs`: the mount(8) helper for the type `fuse.diffmergefs`."""

from __future__ import annotations

import signal
from collections.abc import Iterable

import click

from diffmergefs import cli
from diffmergefs.cli.mount import mount
from diffmergefs.cli.mountoptions import OPPOSITES, arguments_of, sort_options
from diffmergefs.cli.output import print_diagnostic

NAME = "mount.fuse.diffmergefs"

# The return codes of mount(8), which exits with the code of its helper.
USAGE, BUG, INTERRUPTED, FAILED = 1, 4, 8, 32

_LAYERS = ("base", "diff")
_REFUSED = {
    "foreground": "mount(8) would wait until the daemon ends",
    "help": "see diffmergefs-mount(1)",
}


@click.command(NAME, context_settings=cli.CONTEXT_SETTINGS)
@click.argument("source")
@click.argument("mountpoint")
@click.option("-o", "options", multiple=True, metavar="OPT[,OPT...]", help="Mount options.")
@click.option("-s", "sloppy", is_flag=True, help="Ignore unknown options, with a line for each.")
@click.option("-f", "fake", is_flag=True, help="Check the options, but do not mount.")
@click.option("-n", "no_mtab", is_flag=True, help="Accepted, without effect.")
@click.option("-v", "verbose", is_flag=True, help="Accepted, without effect.")
@click.option("-t", "kind", metavar="TYPE", help="Only fuse.diffmergefs.")
def helper(
    source: str,
    mountpoint: str,
    options: tuple[str, ...],
    sloppy: bool,
    fake: bool,
    no_mtab: bool,
    verbose: bool,
    kind: str | None,
) -> int:
    """Mount SOURCE on MOUNTPOINT. mount(8) runs this for fstab and `mount -t`.

    The options are the long options of `diffmergefs mount`, as in -o allow_other,page_size=16384,
    and those of mount(8). With diff=FILE (repeat it, oldest first), SOURCE is the base.

    \b
    Examples:
      mount -t fuse.diffmergefs /srv/snapshots /mnt/views -o allow_other
      mount -t fuse.diffmergefs mem_file /mnt/view -o diff=mem_diff
    """
    if kind not in (None, "fuse.diffmergefs"):
        raise click.UsageError(f"-t {kind}: only fuse.diffmergefs is supported")
    found = sort_options(
        options,
        mount.long_options(),
        ignored=OPPOSITES,
        refused=_REFUSED,
        unknown=_ignore if sloppy else None,
    )
    layers = [(name, value or "") for name, value in found.ours if name in _LAYERS]
    arguments = arguments_of(each for each in found.ours if each[0] not in _LAYERS)
    arguments += [f"-o{option}" for option in found.libfuse]
    arguments += [*_explicit(source, layers), "--"] if layers else ["--", source]
    arguments.append(mountpoint)
    if fake:
        mount.make_context(NAME, arguments, **helper.context_settings).close()
        return 0
    settings = {"prog_name": NAME, "standalone_mode": False, **helper.context_settings}
    return int(mount.main(arguments, **settings))


def _ignore(option: str) -> None:
    print_diagnostic(f"-o {option}: unknown option, ignored")


def _explicit(source: str, layers: Iterable[tuple[str, str]]) -> list[str]:
    # SOURCE is the base. So the mount table has the same entry as fstab, and `mount -a` recognizes
    # what is already mounted.
    diffs = [value for name, value in layers if name == "diff"]
    bases = [value for name, value in layers if name == "base"] or [source]
    if len(bases) > 1 or (source != "none" and bases != [source]):
        raise click.UsageError(f"-o base={bases[-1]}: SOURCE is already the base, {source}")
    return [f"--base={bases[0]}", *(f"--diff={diff}" for diff in diffs)]


def main(arguments: list[str] | None = None) -> int:
    """Run the helper. Return one of mount(8)'s codes: 1 usage, 4 bug, 8 interrupted, 32 other.

    `arguments` are those of `cli.main`, and so is the treatment of root's environment.
    """
    status = cli.main(arguments, helper, NAME)
    known = {0: 0, cli.USAGE: USAGE, cli.BUG: BUG, 128 + signal.SIGINT: INTERRUPTED}
    return known.get(status, FAILED)
