"""Opening files beneath a directory: no symlink or `..` is followed, no FIFO or device opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePath

from diffmergefs.core.errors import NO_PROC, FileAccessError, UnsupportedPlatformError

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_PASS_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_OPEN_REGULAR = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY


class AllowedRoots:
    """The directory `root`, an open descriptor, and the directories `outside` that a user allows.

    The functions here take it as their `root`. A relative path is opened beneath `root`. An
    absolute path is opened beneath the deepest directory of `outside` that is a prefix of it, and
    refused without one. That directory itself may be a symlink; each call resolves it again.
    """

    def __init__(self, root: int, outside: Iterable[str] = ()) -> None:
        self.root = root
        self.outside = sorted({os.path.abspath(path) for path in outside}, key=len, reverse=True)

    def allowed(self, path: str) -> str | None:
        """The deepest directory of `outside` that is the absolute `path` or a prefix of it."""
        if not path.startswith("/"):
            return None
        within = (top for top in self.outside if f"{path}/".startswith(f"{top.rstrip('/')}/"))
        return next(within, None)


Root = int | AllowedRoots


def open_directory(root: Root, relative: str = "") -> int:
    """A new descriptor of the directory `relative` beneath the directory `root`.

    '' is the root itself. Raises OSError (ENOTDIR if a component is a symlink) and
    FileAccessError for a `..` or an absolute path that `root` does not allow.
    """
    with _walked(root, relative) as (parent, name):
        return os.open(name, _OPEN_DIRECTORY, dir_fd=parent)


def open_regular(root: Root | None, path: str) -> int:
    """A new read-only descriptor of the regular file `path`, beneath the directory `root`.

    With `root` None, `path` is any path and symlinks are followed. Raises FileAccessError for
    anything but a regular file, without opening it, OSError as open(2) does, and
    UnsupportedPlatformError if /proc is not mounted.
    """
    with closing_fd(open_handle(root, path)) as handle:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise FileAccessError(f"{path}: {_KINDS.get(stat.S_IFMT(mode))}, not a regular file")
        try:
            return os.open(f"/proc/self/fd/{handle}", _OPEN_REGULAR)
        except FileNotFoundError as error:
            # The file is open, so it exists: /proc is what is missing.
            raise UnsupportedPlatformError(NO_PROC) from error


def open_handle(root: Root | None, path: str) -> int:
    """A new O_PATH descriptor of whatever is at `path`; arguments as for `open_regular`.

    It opens nothing: a FIFO does not block and a device does not act. Check the descriptor and then
    open it through /proc/self/fd, and nobody can exchange the file in between.
    """
    if root is None:
        return os.open(path, os.O_PATH)
    with _walked(root, path) as (parent, name):
        return os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent)


def stat_beneath(root: Root, relative: str) -> os.stat_result:
    """lstat of `relative` beneath `root`; raises like `open_directory`."""
    with _walked(root, relative) as (parent, name):
        return os.stat(name, dir_fd=parent, follow_symlinks=False)


@contextmanager
def passing(root: Root | None, folder: str = "") -> Iterator[int]:
    """An O_PATH descriptor of the directory `folder` beneath `root`, closed when the context ends.

    It requires permission to search the directory, not to read it. With `root` None, `folder` is
    any path and symlinks are followed. Raises like `open_directory`.
    """
    if root is None:
        fd = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY)
    else:
        with _walked(root, folder) as (parent, name):
            fd = os.open(name, _PASS_DIRECTORY, dir_fd=parent)
    with closing_fd(fd):
        yield fd


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """The open descriptor `fd`, closed when the context ends."""
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _walked(root: Root, path: str) -> Iterator[tuple[int, str]]:
    # The directory that holds the last component of `path`, and that component. With O_PATH,
    # passing through a directory requires permission to search it, not to read it.
    fd, names = _start(root, path)
    try:
        for name in names[:-1]:
            inner = os.open(name, _PASS_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd, names[-1] if names else "."
    finally:
        os.close(fd)


def _start(root: Root, path: str) -> tuple[int, list[str]]:
    if isinstance(root, AllowedRoots):
        if top := root.allowed(path):
            names = _components(path[len(top) :].lstrip("/"))
            return os.open(top, os.O_PATH | os.O_DIRECTORY), names
        root = root.root
    names = _components(path)
    return os.open(".", _PASS_DIRECTORY, dir_fd=root), names


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
