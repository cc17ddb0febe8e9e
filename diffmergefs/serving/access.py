"""Who may read a view: never more people than its layers and the directories above them let."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from diffmergefs.layer import Layer

_READ = 0o444
_NO_ACL = frozenset({errno.ENODATA, errno.EOPNOTSUPP})


class Access(NamedTuple):
    """Owner, group and permission bits of a file of the view."""

    uid: int
    gid: int
    mode: int


def view_access(layers: Iterable[Layer], root: str, paths: Iterable[str] | None = None) -> Access:
    """Owner and read bits of the view over `layers`.

    `paths`, by default the layers' own, are where the layers lie now, relative to `root`.

    If all layers share owner and group, those are the view's, with the AND of the layers' read
    bits; otherwise the owner is the mounting user with 0400, plus 044 only if every layer is
    readable by all. A class keeps its bit only where every directory on each layer's real path
    lets it search. A file with an ACL counts as 0400. Reads metadata only; raises OSError.
    """
    layers = list(layers)
    stats = [os.fstat(layer.fd) for layer in layers]
    bits = _READ
    for layer, status in zip(layers, stats, strict=True):
        bits &= file_bits(layer.fd, status.st_mode)
    owners = {(s.st_uid, s.st_gid) for s in stats}
    if len(owners) == 1:
        uid, gid = owners.pop()
    else:
        uid, gid = os.geteuid(), os.getegid()
        bits = 0o400 | (0o044 if bits == _READ else 0)
    paths = [layer.path for layer in layers] if paths is None else paths
    folders = {folder for path in paths for folder in real_folders(os.path.join(root, path))}
    return Access(uid, gid, bits & reachable(folders, uid, gid))


def file_bits(file: int | str, mode: int) -> int:
    """The permission bits of `file`, whose st_mode is `mode`, that its mirror can have.

    Where there is an ACL, the owner's alone: 0400 of a file, 0700 of a directory.
    """
    if stat.S_ISLNK(mode) or not has_acl(file):
        return mode & 0o777
    return mode & (0o700 if stat.S_ISDIR(mode) else 0o400)


def has_acl(file: int | str) -> bool:
    """Whether a POSIX ACL restricts or extends the permission bits of `file`."""
    try:
        os.getxattr(file, "system.posix_acl_access")
    except OSError as error:
        if error.errno in _NO_ACL:
            return False
        raise
    return True


def reachable(folders: Iterable[str], uid: int, gid: int) -> int:
    """The permission bits (of 0777) of those classes that may search every one of `folders`.

    The classes are those of a file of `uid` and `gid`. Where a folder has another owner or group
    it is not known in which of its classes a member falls, so both must be allowed.
    """
    bits = 0o777
    for folder in folders:
        status = os.stat(folder)
        mode = file_bits(folder, status.st_mode)
        strangers = mode & 0o011 == 0o011
        if not (mode & 0o100 if status.st_uid == uid else strangers or uid == os.geteuid()):
            bits &= ~0o700
        if not (mode & 0o010 if status.st_gid == gid else strangers):
            bits &= ~0o070
        if not strangers:
            bits &= ~0o007
    return bits


def folder_bits(path: str) -> int:
    """The bits of the directory `path` that its mirror in a view can have.

    Its own (the owner's alone where it has an ACL), for those classes that may reach it.
    """
    status = os.stat(path)
    mode = file_bits(path, status.st_mode)
    above = [folder for folder in real_folders(path) if folder != os.path.realpath(path)]
    return mode & reachable(above, status.st_uid, status.st_gid)


def real_folders(path: str) -> Iterator[str]:
    """The directories above the real path of `path`."""
    for folder in Path(os.path.realpath(path)).parents:
        yield str(folder)
