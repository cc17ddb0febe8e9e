"""Mountpoints: what may be mounted on, and whether what is mounted there answers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from diffmergefs.core.errors import (
    FileAccessError,
    MountpointError,
    MountTimeoutError,
    counted,
)
from diffmergefs.system import children
from diffmergefs.system.mounted import detach
from diffmergefs.system.mounttable import (
    FILESYSTEM_TYPE,
    Mount,
    mount_entry,
    mount_over,
    resolved,
)

log = logging.getLogger(__name__)

FUSE_CONF = "/etc/fuse.conf"
FUSE_DEVICE = "/dev/fuse"


def others_may_be_let_in() -> bool:
    """Whether /etc/fuse.conf lets ordinary users mount with allow_other.

    True if it cannot be read, because only fusermount3 has to read it.
    """
    try:
        text = Path(FUSE_CONF).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return "user_allow_other" in (line.strip() for line in text.splitlines())


def check_mountpoint(
    mountpoint: str, source: str | None, layers: Iterable[str], outside: Iterable[str] = ()
) -> str:
    """The real path of a mountpoint, checked for a mount of `source` and `layers`.

    `outside` are further directories that may hold layers of `source`. A stale mount of ours on the
    mountpoint is unmounted, with a warning in the log. Raises MountpointError if the mountpoint is
    missing, is not an empty directory, is a mount already, is `source` or one of `outside` or
    inside them, or is above a layer (a daemon that accesses its own mount hangs). Raises
    MountTimeoutError if it lies in a mount of ours whose daemon does not answer, and
    FileAccessError if that daemon has died.
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
        if not children.is_connected(known.path):
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

    Raises FileAccessError if that daemon has died. A path outside of our mounts is not accessed.
    """
    known = mount_over(resolved(path))
    if known is None or known.kind != FILESYSTEM_TYPE:
        return
    try:
        if children.is_connected(known.path):
            return
    except TimeoutError as error:
        raise no_answer(path, known) from error
    raise FileAccessError(
        f"{path}{_in_mount(path, known)}: a stale mount, whose daemon died; remove it with"
        f" `diffmergefs umount {known.path}`, or mount there again"
    )


def no_answer(path: str, known: Mount) -> MountTimeoutError:
    """The error for a mount whose daemon hangs."""
    return MountTimeoutError(
        f"{path}{_in_mount(path, known)}: the daemon has not answered for"
        f" {children.ANSWER_SECONDS:g} s; if the daemon hangs, and not its storage, detach it with"
        f" `diffmergefs umount --lazy {known.path}`"
    )


def _in_mount(path: str, known: Mount) -> str:
    return "" if path == known.path else f", in the mount on {known.path}"


def _require_empty(mountpoint: str, real: str) -> None:
    try:
        entries = os.listdir(real)
    except OSError as error:
        raise MountpointError(
            f"{mountpoint}: {error.strerror}; a mountpoint is an existing, empty directory"
        ) from error
    if entries:
        raise MountpointError(
            f"{mountpoint}: not empty ({counted(len(entries), 'file')}); a mountpoint is an empty"
            " directory, and comes after SOURCE"
        )
