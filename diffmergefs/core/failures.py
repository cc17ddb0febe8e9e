"""OSErrors as one-line errors with a path, and the free space of a filesystem."""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager
from types import TracebackType
from typing import NamedTuple

from diffmergefs.core.errors import DiffMergeError, FileAccessError, NoSpaceError

#: The errnos for a full filesystem and for an exhausted quota.
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


class Target(NamedTuple):
    """A file being written: its descriptor, open for reading and writing, and its path."""

    fd: int
    path: str


def failures(path: str, target: Target | None = None) -> AbstractContextManager[None]:
    """Turn an OSError into a FileAccessError whose one line begins with `path`.

    With `target`, the file being written, a full filesystem or quota becomes a NoSpaceError. What
    the failed work had open is closed when the error is dropped, without a garbage collection.
    """
    return _Failures(path, target)


class _Failures(AbstractContextManager[None]):
    # Not a generator: since Python 3.12 an error that one raises for another refers to itself.

    def __init__(self, path: str, target: Target | None) -> None:
        self._path = path
        self._target = target

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            raise described(error, self._path, self._target) from error


def described(error: OSError, path: str, target: Target | None = None) -> DiffMergeError:
    """The error that `failures` raises in place of `error`."""
    if target is None or error.errno not in NO_SPACE:
        return FileAccessError(f"{path}: {error.strerror or error}")
    return NoSpaceError(
        f"{target.path}: {error.strerror} while writing an image of"
        f" {os.fstat(target.fd).st_size} bytes, {free_bytes(target.fd)} are free on its"
        " filesystem; make room or write it elsewhere"
    )


def free_bytes(fd: int) -> int | None:
    """The bytes free for an unprivileged user on the filesystem of `fd`; None if not limited.

    A tmpfs without a limit and some FUSE filesystems report a total of zero blocks. Other FUSE
    servers do not implement the call: for them too the answer is None.
    """
    status = _statvfs(fd)
    return status.f_bavail * status.f_frsize if status and status.f_blocks else None


def block_size(fd: int) -> int:
    """The size in bytes of the blocks that the filesystem of `fd` stores and can share."""
    status = _statvfs(fd)
    return status.f_frsize if status else os.fstat(fd).st_blksize


def _statvfs(fd: int) -> os.statvfs_result | None:
    try:
        return os.fstatvfs(fd)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return None
