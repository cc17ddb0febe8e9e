"""The mountpoint: what can be mounted on, what is mounted there, and unmounting."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress

from diffmergefs.core.errors import BusyError, DiffMergeError, MountpointError, MountTimeoutError
from diffmergefs.system import asking, tuning
from diffmergefs.system.holders import holders, told
from diffmergefs.system.mounttable import FILESYSTEM_TYPE as FILESYSTEM_TYPE
from diffmergefs.system.mounttable import Mount, MountTable, in_other_namespaces, mount_over, mounts
from diffmergefs.system.mounttable import mount_entry as mount_entry
from diffmergefs.system.mounttable import resolved as resolved

log = logging.getLogger(__name__)

#: Where root looks for helpers: what stands in the PATH of whoever called it could be anyone's.
ROOTS_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MNT_DETACH = 2
_MOST_HOLDERS = 10


def check_mountpoint(
    mountpoint: str, source: str | None, layers: Iterable[str], outside: Iterable[str] = ()
) -> str:
    """The real path of a mountpoint that can be used for `source` and `layers`.

    `outside` are directories in which layers of `source` may lie too. A stale mount of ours on the
    mountpoint is unmounted, with a warning in the log. Raises MountpointError: it is missing, no
    directory, not empty, already a mount, `source` or one of `outside` or inside it, or above a
    layer (a daemon that looks into its own mount hangs). Raises MountTimeoutError where it lies in
    a mount of ours whose daemon does not answer.
    """
    real = _free_path(mountpoint)
    folders = [("the source", source)] if source is not None else []
    folders += [("the allowed directory", folder) for folder in outside]
    for what, folder in folders:
        above = resolved(folder)
        if os.path.commonpath([real, above]) == above:
            raise MountpointError(
                f"{mountpoint}: is {'' if real == above else 'inside '}{what} {folder};"
                " mount it elsewhere"
            )
    for layer in [*layers, *(folder for _, folder in folders)]:
        if os.path.commonpath([real, resolved(layer)]) == real:
            raise MountpointError(
                f"{mountpoint}: lies above {layer}, which the mount would hide and hang on;"
                " mount it elsewhere"
            )
    _require_empty(mountpoint, real)
    return real


def _free_path(mountpoint: str) -> str:
    path = resolved(mountpoint)
    known = mount_entry(path)
    if known is None:
        require_answer(mountpoint)
    elif known.kind.startswith("fuse"):
        _require_stale(mountpoint, known)
    return path


def _require_stale(mountpoint: str, known: Mount) -> None:
    is_ours = known.kind == FILESYSTEM_TYPE
    hint = ""
    try:
        if not asking.is_connected(known.path):
            if not is_ours:
                raise MountpointError(
                    f"{mountpoint}: a stale mount of type {known.kind}; unmount it first"
                )
            log.warning("%s: a stale mount of a daemon that died; unmounted", mountpoint)
            detach(known.path)
            return
    except TimeoutError:
        hint = ", and its server does not answer"
    if is_ours or hint:
        raise MountpointError(f"{mountpoint}: {known.source} is mounted there already{hint}")


def require_answer(path: str) -> None:
    """Raise MountTimeoutError if `path` lies in a mount of ours whose daemon hangs.

    Anywhere else it is not looked at. A daemon that has died counts as an answer.
    """
    known = mount_over(resolved(path))
    if known is None or known.kind != FILESYSTEM_TYPE:
        return
    try:
        asking.is_connected(known.path)
    except TimeoutError as error:
        raise no_answer(path, known) from error


def no_answer(path: str, known: Mount) -> MountTimeoutError:
    """The error of a mount whose daemon hangs."""
    where = "" if path == known.path else f", in the mount on {known.path}"
    return MountTimeoutError(
        f"{path}{where}: the daemon has not answered for {asking.SECONDS:g} s; if it hangs, and"
        f" not its storage, take it away with `diffmergefs umount --lazy {known.path}`"
    )


def _require_empty(mountpoint: str, real: str) -> None:
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


def mount_at(mountpoint: str) -> Mount:
    """The diffmergefs mount on `mountpoint`. Raises MountpointError if there is none."""
    known = mount_entry(resolved(mountpoint))
    if known is None or known.kind != FILESYSTEM_TYPE:
        found = f", but a mount of type {known.kind}" if known else ""
        raise MountpointError(f"{mountpoint}: not a diffmergefs mount point{found}")
    return known


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount a diffmergefs mount.

    Raises BusyError, which names the processes that can be seen to keep files of it open, unless
    `lazy`: then it is detached, and its daemon serves the open files on until the last is closed.
    Where it is mounted besides, as by a bind mount of one of its files, a warning in the log says.
    Raises MountpointError where no diffmergefs is mounted.
    """
    known = mount_at(mountpoint)
    elsewhere = _elsewhere(known)
    if lazy:
        detach(known.path)
    else:
        _unmount_idle(mountpoint, known)
    # What comes to stand under its device number now is another mount.
    if elsewhere and (others := [place for place in _elsewhere(known) if place in elsewhere]):
        log.warning(
            "%s: unmounted, but it is mounted on %s too: its daemon serves on until that is"
            " unmounted",
            mountpoint,
            ", ".join(others),
        )


def _elsewhere(known: Mount) -> list[str]:
    # Where the filesystem of the mount is mounted besides.
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


class OwnMount:
    """The mount that stood on its mountpoint, as `entry`, when it was made.

    Nothing that is asked reaches the mount itself: this process would have to answer.
    """

    def __init__(self, entry: Mount) -> None:
        self.device = entry.device
        self._number = entry.number
        self.source = entry.source

    def _is_it(self, entry: Mount) -> bool:
        return (entry.number, entry.device) == (self._number, self.device)

    def obstacle(self) -> str:
        """Why it cannot be detached now: what covers it. '' if nothing does, or it is gone."""
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
        """Take it off, wherever it stands; '' if it is gone then, else what is in the way."""
        try:
            if obstacle := self.obstacle():
                return obstacle
            for entry in filter(self._is_it, mounts()):
                detach(entry.path)
        except (DiffMergeError, OSError) as error:
            return str(error)
        return ""

    def is_shown(self) -> bool:
        """Whether its filesystem is mounted anywhere, seen from here."""
        return bool(self._shown())

    def is_known(self) -> bool:
        """Whether the kernel has its connection still. False without fusectl."""
        return os.path.exists(tuning.connection(self.device))

    def elsewhere(self) -> list[str]:
        """Where the filesystem is mounted besides, seen from here: bind mounts, of one file too."""
        return [entry.path for entry in self._shown() if not self._is_it(entry)]

    def _shown(self) -> list[Mount]:
        try:
            # The kernel gives a free device number to the next mount, whose ever it is.
            mine = self.device, self.source
            return [entry for entry in mounts() if (entry.device, entry.source) == mine]
        except (DiffMergeError, OSError):
            return []  # /proc went away: nothing can be said
