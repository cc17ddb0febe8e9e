"""Failures of files as one line each, and how much room a filesystem has."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from diffmergefs.core.errors import DiffMergeError, FileAccessError, NoSpaceError

#: What says that there is no room for the output, or none left of the writer's quota.
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


class Target(NamedTuple):
    """A file that is written: its descriptor, open for reading and writing, and its path."""

    fd: int
    path: str


@contextmanager
def failures(path: str, target: Target | None = None) -> Iterator[None]:
    """Turn an OSError into one line: FileAccessError, with `path`.

    With `target`, the file that is written, no space (or quota) left is NoSpaceError.
    """
    try:
        yield
    except OSError as error:
        raise described(error, path, target) from error


def described(error: OSError, path: str, target: Target | None = None) -> DiffMergeError:
    """What `failures` raises in the place of `error`."""
    if target is None or error.errno not in NO_SPACE:
        return FileAccessError(f"{path}: {error.strerror or error}")
    return NoSpaceError(
        f"{target.path}: {error.strerror} while writing an image of"
        f" {os.fstat(target.fd).st_size} bytes, {free_bytes(target.fd)} are free on its"
        " filesystem; make room or write it elsewhere"
    )


def free_bytes(fd: int) -> int | None:
    """What an unprivileged user may still write on the filesystem of `fd`; None if it has no limit.

    A tmpfs without a limit, and some FUSE filesystems, report zero blocks in all; other FUSE
    servers cannot be asked.
    """
    status = _statvfs(fd)
    return status.f_bavail * status.f_frsize if status and status.f_blocks else None


def block_size(fd: int) -> int:
    """The unit in bytes in which the filesystem of the file `fd` stores, and may share, blocks."""
    status = _statvfs(fd)
    return status.f_frsize if status else os.fstat(fd).st_blksize


def _statvfs(fd: int) -> os.statvfs_result | None:
    try:
        return os.fstatvfs(fd)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return None
