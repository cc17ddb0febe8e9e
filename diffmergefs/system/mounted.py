"""Mounts of ours: finding and unmounting them, and the one that a daemon serves itself."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import subprocess
from contextlib import suppress

from diffmergefs.core.errors import BusyError, DiffMergeError, MountpointError, os_error
from diffmergefs.system import tuning
from diffmergefs.system.children import ROOTS_PATH
from diffmergefs.system.mounttable import (
    Mount,
    MountTable,
    holders,
    in_other_namespaces,
    mount_entry,
    mounts,
    resolved,
    summary,
)

log = logging.getLogger(__name__)

_MNT_DETACH = 2
_MOST_HOLDERS = 10


def mount_at(mountpoint: str) -> Mount:
    """The diffmergefs mount on `mountpoint`.

    Raises MountpointError if there is none. It names the mount that the path lies in, or the places
    where the path is mounted, if there are any. Nothing in a mount of ours is accessed.
    """
    path = resolved(mountpoint)
    known = mount_entry(path)
    if known is not None and known.is_ours:
        return known
    table = MountTable()
    above = table.over(path)
    if above is not None and above.is_ours:
        raise MountpointError(
            f"{mountpoint}: is no mountpoint itself, but lies in the mount on {above.path};"
            f" name {above.path}"
        )
    places = [entry.path for entry in table.entries if entry.is_ours and entry.source == path]
    if places:
        raise MountpointError(
            f"{mountpoint}: is no mountpoint itself, but is mounted on {', '.join(places)};"
            f" name {places[0]}"
        )
    found = f", but a mount of type {known.kind}" if known else ""
    raise MountpointError(
        f"{mountpoint}: not a diffmergefs mount point{found}; `diffmergefs status` lists the mounts"
    )


def mounts_of(user: int | None) -> list[Mount]:
    """The diffmergefs mounts of the user with this uid, or all if None, in the order of the table.

    Left out are those that another mount covers, and bind mounts of a part of a view.
    """
    table = MountTable()
    return [
        entry
        for entry in table.entries
        if entry.is_ours
        and entry.root == "/"
        and (user is None or (entry.owner or [None])[0] == user)
        and table.over(entry.path) == entry
    ]


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount a diffmergefs mount.

    Raises BusyError with the processes that are seen to keep its files open, unless `lazy`: then it
    is detached, and its daemon serves the open files until the last one is closed. If the
    filesystem is mounted elsewhere too, for example by a bind mount of one of its files, a warning
    in the log says where. Raises MountpointError if no diffmergefs is mounted there.
    """
    known = mount_at(mountpoint)
    elsewhere = _elsewhere(known)
    if lazy:
        detach(known.path)
    else:
        _unmount_idle(mountpoint, known)
    # From now on its device number may belong to another mount, so only known places count.
    if elsewhere and (others := [place for place in _elsewhere(known) if place in elsewhere]):
        log.warning(
            "%s: unmounted, but it is also mounted on %s: its daemon runs until that is unmounted",
            mountpoint,
            ", ".join(others),
        )


def _elsewhere(known: Mount) -> list[str]:
    # Where else the filesystem of this mount is mounted.
    mine = (known.kind, known.device, known.source)
    found = [m.path for m in mounts() if (m.kind, m.device, m.source) == mine]
    with suppress(ValueError):
        found.remove(known.path)
    return found + in_other_namespaces(known.device, known.source)


def _unmount_idle(mountpoint: str, known: Mount) -> None:
    try:
        _unmount(known.path, 0, [])
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(
                f"{mountpoint}: files of it are open{_by_whom(known)}; stop the VMs that use it, or"
                " detach it with --lazy: it is then served until the last file is closed"
            ) from error
        raise MountpointError(f"{mountpoint}: {error.strerror}") from error


def _by_whom(known: Mount) -> str:
    try:
        found = holders(known.device, known.path)
    except OSError as error:
        return f" (the processes are unknown: {error})"
    by = summary(found.holders, _MOST_HOLDERS) if found.holders else "no visible process"
    if os.geteuid() != 0:
        return f" by {by} (other users' processes are not visible)"
    return f" by {by}" + (f" ({found.unseen} could not be inspected)" if found.unseen else "")


def detach(path: str) -> None:
    """Detach the mount on `path` from the directory tree; its open files are still served.

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
        raise os_error(number)
    done = subprocess.run([helper, "-u", *options, "--", path], capture_output=True, text=True)
    if done.returncode == 0:
        return
    if "busy" in done.stderr:
        raise OSError(errno.EBUSY, done.stderr.strip())
    known = mount_entry(path)
    owner = known.owner if known else None
    if owner is not None and owner[0] != os.geteuid():
        raise OSError(errno.EPERM, f"only root and its owner, uid {owner[0]}, may unmount it")
    raise OSError(errno.EPERM, done.stderr.strip() or "refused")


class OwnMount:
    """The mount that this daemon serves, wherever it was moved since `entry` was read.

    Nothing here accesses the mount itself: this process would have to answer.
    """

    def __init__(self, entry: Mount) -> None:
        self.device = entry.device
        self._number = entry.number
        self.source = entry.source

    def _is_it(self, entry: Mount) -> bool:
        return (entry.number, entry.device) == (self._number, self.device)

    def obstacle(self) -> str:
        """Why it cannot be detached now: what covers it. '' if nothing does, or if it is gone."""
        try:
            table = MountTable()
        except (DiffMergeError, OSError) as error:
            return str(error)
        for entry in filter(self._is_it, table.entries):
            top = table.over(entry.path)
            if top is not None and not self._is_it(top):
                return f"{entry.path}: a {top.kind} on {top.path} covers it"
        return ""

    def detach(self) -> str:
        """Detach it wherever it is mounted; '' if it is gone then, else the obstacle."""
        try:
            if obstacle := self.obstacle():
                return obstacle
            for entry in filter(self._is_it, mounts()):
                detach(entry.path)
        except (DiffMergeError, OSError) as error:
            return str(error)
        return ""

    def is_shown(self) -> bool:
        """Whether its filesystem is mounted anywhere in this mount namespace."""
        return bool(self._shown())

    def is_known(self) -> bool:
        """Whether the kernel still has its connection. False without fusectl."""
        return os.path.exists(tuning.connection(self.device))

    def elsewhere(self) -> list[str]:
        """Where else in this namespace the filesystem is mounted: bind mounts, also of files."""
        return [entry.path for entry in self._shown() if not self._is_it(entry)]

    def _shown(self) -> list[Mount]:
        try:
            # The kernel reuses a free device number for any other mount.
            mine = self.device, self.source
            return [entry for entry in mounts() if (entry.device, entry.source) == mine]
        except (DiffMergeError, OSError):
            return []  # /proc is gone, so nothing is known
