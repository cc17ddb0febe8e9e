"""Opening files beneath a directory: no symlink or `..` is followed, no FIFO or device opened."""

from __future__ import annotations

import os
import stat
from pathlib import PurePath

from diffmergefs.errors import FileAccessError

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PASS_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_REGULAR = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def open_directory(root: int, relative: str = "") -> int:
    """A new descriptor of the directory `relative` beneath the directory `root`.

    '' is the root itself. Raises OSError (ENOTDIR where a component is a symlink) and
    FileAccessError for a `..` or an absolute path.
    """
    names = _components(relative)
    if not names:
        return os.open(".", _OPEN_DIRECTORY, dir_fd=root)
    parent = _walk(root, names[:-1])
    try:
        return os.open(names[-1], _OPEN_DIRECTORY, dir_fd=parent)
    finally:
        os.close(parent)


def open_regular(root: int | None, path: str) -> int:
    """A new read-only descriptor of the regular file `path`, beneath the directory `root`.

    With `root` None, `path` is any path and symlinks are followed. Raises FileAccessError for
    anything but a regular file, without opening it, and OSError as open(2) does.
    """
    handle = open_handle(root, path)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise FileAccessError(f"{path}: {_KINDS.get(stat.S_IFMT(mode))}, not a regular file")
        return os.open(f"/proc/self/fd/{handle}", _OPEN_REGULAR)
    finally:
        os.close(handle)


def open_handle(root: int | None, path: str) -> int:
    """A new O_PATH descriptor of whatever stands at `path`; arguments as of `open_regular`.

    It opens nothing: a FIFO does not block and a device does not act. What it names cannot be
    exchanged between a check and an open through /proc/self/fd.
    """
    if root is None:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    names = _components(path)
    if not names:
        return os.open(".", os.O_PATH | os.O_CLOEXEC, dir_fd=root)
    parent = _walk(root, names[:-1])
    try:
        return os.open(names[-1], os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    finally:
        os.close(parent)


def stat_beneath(root: int, relative: str) -> os.stat_result:
    """lstat of `relative` beneath `root`; raises like `open_directory`."""
    names = _components(relative)
    if not names:
        return os.stat(root)
    parent = _walk(root, names[:-1])
    try:
        return os.stat(names[-1], dir_fd=parent, follow_symlinks=False)
    finally:
        os.close(parent)


def _walk(root: int, names: list[str]) -> int:
    # O_PATH: passing through a directory takes the permission to search it, not to read it.
    fd = os.open(".", _PASS_DIRECTORY, dir_fd=root)
    try:
        for name in names:
            inner = os.open(name, _PASS_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = inner
    except BaseException:
        os.close(fd)
        raise
    return fd


def _components(relative: str) -> list[str]:
    parts = PurePath(relative).parts
    if relative.startswith("/") or ".." in parts or "\0" in relative:
        raise FileAccessError(f"{relative!r}: not a path beneath its directory")
    return list(parts)


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symlink",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}
