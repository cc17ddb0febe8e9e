"""`mount.fuse.diffmergefs`: what mount(8) runs for the type `fuse.diffmergefs`."""

from __future__ import annotations

import signal
from collections.abc import Iterable

import click

from diffmergefs import cli
from diffmergefs.cli.mount import mount, option_name, split_options
from diffmergefs.cli.output import print_diagnostic

NAME = "mount.fuse.diffmergefs"

# mount(8)'s "Return codes": its caller gets ours as they are.
_USAGE, _BUG, _INTERRUPTED, _FAILED = 1, 4, 8, 32

# Of mount(8), systemd and autofs; they mean nothing here, or what a view is in any case. (Even
# without options mount(8) passes `rw`.)
_OF_MOUNT = {
    *("defaults", "rw", "ro", "suid", "nosuid", "dev", "nodev", "exec", "noexec"),
    *("auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner"),
    *("group", "nogroup", "nofail", "_netdev", "comment", "helper", "uhelper"),
    *("sync", "async", "dirsync", "silent", "loud", "mand", "nomand", "iversion", "noiversion"),
    *("atime", "diratime", "nodiratime", "relatime", "norelatime"),
    *("strictatime", "nostrictatime", "lazytime", "nolazytime", "default_permissions"),
}
_PREFIXES = ("x-", "X-")
_OF_LIBFUSE = {"noatime", "auto_unmount", "nosymfollow", "symfollow"}
_REFUSED = {
    "remount": "a view's options are those it was mounted with; unmount it first",
    "foreground": "mount(8) would wait for its end",
    "help": "see diffmergefs-mount(1)",
}


@click.command(
    NAME, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.argument("source")
@click.argument("mountpoint")
@click.option("-o", "options", multiple=True, metavar="OPT[,OPT...]", help="Mount options.")
@click.option("-s", "sloppy", is_flag=True, help="Leave out unknown options, with a line for each.")
@click.option("-f", "fake", is_flag=True, help="Check the options, and mount nothing.")
@click.option("-n", "no_mtab", is_flag=True, help="Accepted; there is no mtab.")
@click.option("-v", "verbose", is_flag=True, help="Accepted; mount(8) itself says what it did.")
@click.option("-t", "kind", metavar="TYPE", help="fuse.diffmergefs; nothing else.")
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
    """Mount SOURCE on MOUNTPOINT, as mount(8) asks for it: for fstab and `mount -t`.

    Options are the long ones of `diffmergefs mount`, as in -o allow_other,page_size=16384, and
    mount(8)'s own. With diff=FILE (repeat it, oldest first) SOURCE is the base.

    \b
    Examples:
      mount -t fuse.diffmergefs /srv/snapshots /mnt/views -o allow_other
      mount -t fuse.diffmergefs mem_file /mnt/view -o diff=mem_diff
    """
    if kind not in (None, "fuse.diffmergefs"):
        raise click.UsageError(f"-t {kind}: this mounts fuse.diffmergefs only")
    arguments, layers = _sorted(split_options(options), sloppy=sloppy)
    arguments += [*_explicit(source, layers), "--"] if layers else ["--", source]
    arguments.append(mountpoint)
    if fake:
        mount.make_context(NAME, arguments, **helper.context_settings).close()
        return 0
    settings = {"prog_name": NAME, "standalone_mode": False, **helper.context_settings}
    return int(mount.main(arguments, **settings))


def _sorted(options: Iterable[str], *, sloppy: bool) -> tuple[list[str], list[tuple[str, str]]]:
    # Arguments of `mount`, and apart from them those that name layers.
    arguments, layers = list[str](), list[tuple[str, str]]()
    for option in options:
        name, equals, value = option.partition("=")
        long = option_name(option)
        if long in _REFUSED:
            raise click.UsageError(f"-o {option}: {_REFUSED[long]}")
        if name in _OF_MOUNT or name.startswith(_PREFIXES):
            continue
        if long in ("base", "diff"):
            layers.append((long, value))
        elif long in mount.long_names():
            arguments.append(f"--{long}{equals}{value}")
        elif name in _OF_LIBFUSE:
            arguments += ["-o", option]
        elif sloppy:
            print_diagnostic(f"-o {option}: unknown option, left out")
        else:
            raise click.UsageError(f"-o {option}: unknown option; see diffmergefs-mount(1)")
    return arguments, layers


def _explicit(source: str, layers: Iterable[tuple[str, str]]) -> list[str]:
    # SOURCE is the base: so the table of mounts shows what fstab has, and `mount -a` knows what is
    # mounted already.
    diffs = [value for name, value in layers if name == "diff"]
    bases = [value for name, value in layers if name == "base"] or [source]
    if len(bases) > 1 or (source != "none" and bases != [source]):
        raise click.UsageError(f"-o base={bases[-1]}: SOURCE is the base already, {source}")
    return [f"--base={bases[0]}", *(f"--diff={diff}" for diff in diffs)]


def main(arguments: list[str] | None = None) -> int:
    """Run the helper; its exit code is one of mount(8)'s: 1 usage, 4 a bug, 8 interrupted, 32 else.

    Without `arguments` those of the process count, and root's environment does not, as in
    `cli.main`.
    """
    status = cli.main(arguments, helper, NAME)
    known = {0: 0, cli.USAGE: _USAGE, cli.BUG: _BUG, 128 + signal.SIGINT: _INTERRUPTED}
    return known.get(status, _FAILED)
