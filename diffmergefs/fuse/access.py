"""Who may read a view: only users who may read its layers by their paths.

All functions judge files and directories by their descriptors, because a name may lead to another
file at each look.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from diffmergefs.core import beneath
from diffmergefs.core.errors import os_error
from diffmergefs.core.identity import file_bits
from diffmergefs.core.layer import Layer
from diffmergefs.stores.snapshot import Snapshot
from diffmergefs.system.mounttable import mount_number

_READ = 0o444
_SEARCH = 0o1
LISTING = 0o5
_PASS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


class Access(NamedTuple):
    """Owner, group and permission bits of a file of the view or of a directory."""

    uid: int
    gid: int
    mode: int

    @classmethod
    def of(cls, fd: int) -> Access:
        """The values of the open directory `fd`, with the bits of `file_bits`. Raises OSError."""
        status = os.fstat(fd)
        mode = file_bits(f"/proc/self/fd/{fd}", status.st_mode)
        return cls(status.st_uid, status.st_gid, mode)


def view_access(
    layers: Sequence[Layer], root: beneath.Root | None = None, paths: Sequence[str] = ()
) -> Access:
    """Owner and read bits of the view over `layers`.

    `paths`, one for each layer, are their present paths beneath `root`. Without a `root` the paths
    are those that the kernel reports for the open files.

    If all layers share owner and group, the view has them too, with the AND of the layers' read
    bits. Otherwise the owner is the mounting user with 0400, plus 044 only if every layer is
    readable by all. A class keeps its bit only if it may search every directory through which
    a walk to each layer's path passes now. A file with an ACL counts as 0400. Reads metadata only.
    Raises OSError, ESTALE if a walk leads to another file than the open one.
    """
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
    if root is None:
        paths = [os.readlink(f"/proc/self/fd/{layer.fd}") for layer in layers]
    files: dict[str, dict[str, os.stat_result]] = defaultdict(dict)
    for path, status in zip(paths, stats, strict=True):
        if root is None and status.st_nlink == 0:
            bits &= 0o700  # deleted, or a memfd: no path leads other users to it
        else:
            folder, name = os.path.split(path)
            files[folder][name] = status
    above = {each for folder, held in files.items() for each in _directories_to(root, folder, held)}
    return Access(uid, gid, bits & reachable(above, uid, gid))


def _directories_to(
    root: beneath.Root | None, folder: str, files: dict[str, os.stat_result]
) -> set[Access]:
    with beneath.passing(root, folder) as fd:
        for name, status in files.items():
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            require_same(found, status.st_dev, status.st_ino, os.path.join(folder, name))
        return set(lineage(fd))


def require_same(status: os.stat_result, device: int, inode: int, path: str) -> None:
    """Raise OSError (ESTALE) unless `status`, taken at `path`, is that of this file."""
    if (status.st_dev, status.st_ino) != (device, inode):
        raise os_error(errno.ESTALE, path)


def reachable(folders: Iterable[Access], uid: int, gid: int, need: int = _SEARCH) -> int:
    """The permission bits (of 0777) of those classes that may search every one of `folders`.

    With `need` LISTING, they may list and search them. The classes are those of a file of `uid` and
    `gid`. If a folder has another owner or group, nothing tells in which of the folder's classes
    a member falls, so both must be allowed.
    """
    bits = 0o777
    for folder in folders:
        owner, group, others = (folder.mode >> shift & need == need for shift in (6, 3, 0))
        strangers = group and others
        if not (owner if folder.uid == uid else strangers or uid == os.geteuid()):
            bits &= ~0o700
        if not (group if folder.gid == gid else strangers):
            bits &= ~0o070
        if not strangers:
            bits &= ~0o007
    return bits


def folder_bits(fd: int) -> int:
    """The permission bits that the mount shows for the directory `fd`.

    They are its own (only the owner's if it has an ACL), for the classes that may reach it.
    """
    own, *above = lineage(fd)
    return own.mode & reachable(above, own.uid, own.gid)


def named_folders(root: beneath.Root, heads: Iterable[Snapshot]) -> frozenset[Access]:
    """The directories whose existence the tags of these snapshots reveal.

    A tag may be a path of several components: its readers learn what the directories between hold.
    A directory that cannot be opened lets nobody but its owner list it.
    """
    places = {os.path.dirname(head.folder or head.layer.path) for head in heads}
    found: set[Access] = set()
    for path in {above for place in places for above in _up_to_root(place)}:
        try:
            with beneath.passing(root, path) as fd:
                found.add(Access.of(fd))
        except OSError:
            found.add(Access(os.geteuid(), os.getegid(), 0o700))
    return frozenset(found)


def _up_to_root(path: str) -> Iterator[str]:
    # The directory and those between it and the root. Of one outside the root, only itself.
    while path:
        yield path
        path = "" if path.startswith("/") else os.path.dirname(path)


def lineage(fd: int) -> list[Access]:
    """The directory `fd` and all directories above it, up to the root. It uses no names.

    Raises OSError, for instance if this process may not search one of them.
    """
    found: list[Access] = []
    here = os.open(".", _PASS, dir_fd=fd)
    try:
        while True:
            found.append(Access.of(here))
            above = os.open("..", _PASS, dir_fd=here)
            # A directory that is mounted on one of its own has itself above it, and is no root.
            mounts = [mount_number(f"/proc/self/fdinfo/{each}") for each in (here, above)]
            is_root = os.path.sameopenfile(here, above) and mounts[0] == mounts[1]
            os.close(here)
            here = above
            if is_root:
                return found
    finally:
        os.close(here)
