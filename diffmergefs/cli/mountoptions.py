"""The options of `-o`: those of ours, those for the kernel, and those that mean nothing here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import click

from diffmergefs.cli.output import print_diagnostic

# A comma in a value is escaped by a backslash, or stands between double quotes.
_OPTION = re.compile(r'(?:\\.|"[^"]*"|[^,])+', re.DOTALL)
_SELINUX = "/sys/fs/selinux/enforce"

# For mount(8), systemd and desktops, or always in effect. (Even without options mount(8) passes
# `rw` to its helper.)
_IGNORED = {
    *("defaults", "ro", "nosuid", "nodev", "noexec", "default_permissions"),
    *("auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner"),
    *("group", "nogroup", "nofail", "_netdev", "comment", "helper", "uhelper"),
    *("sync", "async", "dirsync", "silent", "loud", "mand", "nomand", "iversion", "noiversion"),
    *("atime", "diratime", "nodiratime", "relatime", "norelatime"),
    *("strictatime", "nostrictatime", "lazytime", "nolazytime"),
}
_PREFIXES = ("x-", "X-")
#: They would make a view something else. mount(8) may pass them to its helper.
OPPOSITES = {
    "rw": "a view is always read-only",
    "suid": "a view is always nosuid",
    "dev": "a view is always nodev",
    "exec": "a view is always noexec",
}
_OURS = "diffmergefs sets it itself"
REFUSED = {
    **OPPOSITES,
    "remount": "the options of a mount cannot be changed; unmount it first",
    **dict.fromkeys(("max_read", "fsname", "subtype", "fd"), _OURS),
    **dict.fromkeys(("rootmode", "user_id", "group_id"), _OURS),
}
# Other filesystems take them; here they would promise what a view does not do.
_OF_LAYERS = {"uid", "gid", "umask", "fmask", "dmask", "mode"}
_FOR_LIBFUSE = {"allow_root", "noatime", "auto_unmount", "nosymfollow", "symfollow"}
_CONTEXTS = {"context", "fscontext", "defcontext", "rootcontext"}


class MountOptions(NamedTuple):
    """The options of `-o`: `ours`, by the name of the long option, and those for `libfuse`.

    A value of ours has no quotes and escapes any more; an option for libfuse is as it was given.
    """

    ours: list[tuple[str, str | None]]
    libfuse: list[str]


def split_options(options: Iterable[str]) -> list[str]:
    """The single options of several `-o`, as they were given.

    In a value, a comma is written as `\\,`, or between double quotes.
    """
    return _OPTION.findall(",".join(options))


def sort_options(
    options: Iterable[str],
    ours: Collection[str],
    *,
    ignored: Collection[str] = (),
    refused: Mapping[str, str] | None = None,
    unknown: Callable[[str], None] | None = None,
) -> MountOptions:
    """The options of several `-o`. `ours` are long options' names; `_` may stand for `-`.

    What mount(8), systemd and desktops use is left out, and so is `ignored`. SELinux's contexts are
    left out where there is no SELinux, as mount(8) does. A line on stderr names an option that has
    no effect although it has one on other filesystems. `unknown` is called for each unknown option.
    Raises click.UsageError for an option that is refused, with the reason (`refused` are further
    ones, by the name of the long option), and for an unknown one without `unknown`.
    """
    found = MountOptions([], [])
    for option in split_options(options):
        name, equals, value = option.partition("=")
        long = name.replace("_", "-")
        if refused and long in refused:
            raise click.UsageError(f"-o {option}: {refused[long]}")
        if long in ours:
            found.ours.append((long, _unquoted(value) if equals else None))
        elif name in _FOR_LIBFUSE or (name in _CONTEXTS and os.path.exists(_SELINUX)):
            found.libfuse.append(option)
        elif name in _OF_LAYERS:
            print_diagnostic(f"-o {option}: has no effect: a view has the owner and mode of layers")
        elif name in {*_IGNORED, *_CONTEXTS, *ignored} or name.startswith(_PREFIXES):
            continue
        elif name in REFUSED:
            raise click.UsageError(f"-o {option}: {REFUSED[name]}")
        elif unknown is None:
            raise click.UsageError(f"-o {option}: unknown option; see diffmergefs-mount(1)")
        else:
            unknown(option)
    return found


def arguments_of(ours: Iterable[tuple[str, str | None]]) -> list[str]:
    """The same options as arguments: `--page-size=16384`."""
    return [f"--{name}" if value is None else f"--{name}={value}" for name, value in ours]


def unescaped(text: str) -> str:
    """The text without the backslashes that escape commas, quotes and backslashes."""
    return re.sub(r'\\([\\,"])', r"\1", text)


def _unquoted(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in value[1:-1]
    return value[1:-1] if is_quoted else unescaped(value)
