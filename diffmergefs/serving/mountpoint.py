"""The mountpoint: what can be mounted on, what is mounted there, and unmounting."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from diffmergefs.errors import BusyError, MountpointError
from diffmergefs.serving.holders import holders, told

log = logging.getLogger(__name__)

FILESYSTEM_TYPE = "fuse.diffmergefs"
#: Where root looks for helpers: what stands in the PATH of whoever called it could be anyone's.
ROOTS_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MNT_DETACH = 2
_MOST_HOLDERS = 10
_MAX_LINKS = 40


class MountEntry(NamedTuple):
    """One line of /proc/self/mountinfo: where, which device (major:minor), type and source."""

    path: str
    device: str
    kind: str
    source: str


def mount_entry(path: str) -> MountEntry | None:
    """The topmost mount on exactly the real, absolute `path`, or None. Never asks the mount."""
    found = None
    # Only a newline ends a line here; the names may hold what else str.splitlines splits at.
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")[:-1]:
        fields, _, rest = line.partition(" - ")
        _, _, device, _, where, *_ = fields.split(" ")
        kind, source, *_ = rest.split(" ")
        if _unescaped(where) == path:
            found = MountEntry(path, device, kind, _unescaped(source))
    return found


def resolved(mountpoint: str) -> str:
    """The real path of a mountpoint, without asking what is mounted there: it may hang."""
    parent, name = os.path.split(os.path.abspath(mountpoint))
    path = os.path.join(os.path.realpath(parent), name)
    for _ in range(_MAX_LINKS):
        if mount_entry(path) or not os.path.islink(path):
            break
        parent, name = os.path.split(os.path.join(os.path.dirname(path), os.readlink(path)))
        path = os.path.join(os.path.realpath(parent), name)
    return os.path.normpath(path)


def _unescaped(field: str) -> str:
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(field))
    return os.fsdecode(raw)


def check_mountpoint(
    mountpoint: str, source: str | None, layers: Iterable[str], outside: Iterable[str] = ()
) -> str:
    """The real path of a mountpoint that can be used for `source` and `layers`.

    `outside` are directories in which layers of `source` may lie too. A stale mount of ours on the
    mountpoint is unmounted, with a warning in the log. Raises MountpointError: it is missing, no
    directory, not empty, already a mount, `source` or one of `outside` or inside it, or above a
    layer (a daemon that looks into its own mount hangs).
    """
    real = _real_path(mountpoint)
    folders = [("the source", source)] if source is not None else []
    folders += [("the allowed directory", folder) for folder in outside]
    for what, folder in folders:
        above = os.path.realpath(folder)
        if os.path.commonpath([real, above]) == above:
            raise MountpointError(
                f"{mountpoint}: is {'' if real == above else 'inside '}{what} {folder};"
                " mount it elsewhere"
            )
    for layer in [*layers, *(folder for _, folder in folders)]:
        if os.path.commonpath([real, os.path.realpath(layer)]) == real:
            raise MountpointError(
                f"{mountpoint}: lies above {layer}, which the mount would hide and hang on;"
                " mount it elsewhere"
            )
    _require_empty(mountpoint, real)
    return real


def _real_path(mountpoint: str) -> str:
    path = resolved(mountpoint)
    stale = mount_entry(path)
    if stale and _is_disconnected(path):
        if stale.kind != FILESYSTEM_TYPE:
            raise MountpointError(
                f"{mountpoint}: a stale mount of type {stale.kind}; unmount it first"
            )
        log.warning("%s: a stale mount of a daemon that died; unmounted", mountpoint)
        detach(path)
    return os.path.realpath(path)


def _is_disconnected(path: str) -> bool:
    try:
        os.statvfs(path)  # a stat may be answered from the kernel's memory
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def _require_empty(mountpoint: str, real: str) -> None:
    known = mount_entry(real)
    if known is not None and known.kind == FILESYSTEM_TYPE:
        raise MountpointError(f"{mountpoint}: {known.source} is mounted there already")
    try:
        entries = os.listdir(real)
    except OSError as error:
        raise MountpointError(
            f"{mountpoint}: {error.strerror}; a mountpoint is an existing, empty directory"
        ) from error
    if entries:
        raise MountpointError(
            f"{mountpoint}: not empty ({len(entries)} entries); a mountpoint is an empty directory"
        )


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount a diffmergefs mount.

    Raises BusyError, which names the processes that can be seen to keep files of it open, unless
    `lazy`: then it is detached, and its daemon serves the open files on until the last is closed.
    Raises MountpointError where no diffmergefs is mounted.
    """
    path = resolved(mountpoint)
    known = mount_entry(path)
    if known is None or known.kind != FILESYSTEM_TYPE:
        found = f"a {known.kind} is mounted there" if known else "nothing is mounted there"
        raise MountpointError(f"{mountpoint}: no diffmergefs mount, {found}")
    if lazy:
        detach(path)
        return
    try:
        _unmount(path, 0, [])
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(
                f"{mountpoint}: files of it are open{_by_whom(known)}; stop the VMs that use it, or"
                " detach it with --lazy: it is then served until the last file is closed"
            ) from error
        raise MountpointError(f"{mountpoint}: {error.strerror}") from error


def _by_whom(known: MountEntry) -> str:
    try:
        found = holders(known.device, known.path)
    except OSError as error:
        return f" (by whom cannot be told: {error})"
    by = told(found.holders, _MOST_HOLDERS) if found.holders else "nobody that can be seen"
    if os.geteuid() != 0:
        return f" by {by} (other users' processes cannot be seen)"
    return f" by {by}" + (f" ({found.unseen} could not be looked into)" if found.unseen else "")


def detach(path: str) -> None:
    """Take the mount on `path` out of the tree of names; open files stay served.

    Raises MountpointError.
    """
    try:
        _unmount(path, _MNT_DETACH, ["-z"])
    except OSError as error:
        raise MountpointError(f"{path}: cannot be unmounted: {error.strerror}") from error


def _unmount(path: str, flags: int, options: list[str]) -> None:
    if ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(path), flags) == 0:
        return
    number = ctypes.get_errno()
    helper = shutil.which("fusermount3", path=ROOTS_PATH if os.geteuid() == 0 else None)
    if number != errno.EPERM or helper is None:
        raise OSError(number, os.strerror(number))
    done = subprocess.run([helper, "-u", *options, "--", path], capture_output=True, text=True)
    if done.returncode != 0:
        busy = "busy" in done.stderr
        raise OSError(errno.EBUSY if busy else errno.EPERM, done.stderr.strip() or "refused")
