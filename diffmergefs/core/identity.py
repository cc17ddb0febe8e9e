"""What metadata say of a file: its identity, and the permission bits for a copy of it."""

from __future__ import annotations

import errno
import functools
import operator
import os
import stat
from collections.abc import Sequence
from typing import NamedTuple

_NO_ACL = frozenset({errno.ENODATA, errno.EOPNOTSUPP})


class FileKey(NamedTuple):
    """Which file, with which content, as far as metadata tell: it survives renames and chmods."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileKey:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class FileVersion(NamedTuple):
    """Which file, just as a look saw it: whatever is done to it is another version."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileVersion:
        return cls(*FileKey.of(status), status.st_ctime_ns)


def file_bits(file: int | str, mode: int) -> int:
    """The permission bits of `file`, whose st_mode is `mode`, that its mirror can have.

    Where there is an ACL, the owner's alone: 0400 of a file, 0700 of a directory. (The group's bits
    are then a mask and nobody's right; a mirror has no ACL.) Raises OSError.
    """
    if stat.S_ISLNK(mode) or not has_acl(file):
        return mode & 0o777
    return mode & (0o700 if stat.S_ISDIR(mode) else 0o400)


def has_acl(file: int | str) -> bool:
    """Whether a POSIX ACL restricts or extends the permission bits of `file`. Raises OSError."""
    try:
        os.getxattr(file, "system.posix_acl_access")
    except OSError as error:
        if error.errno in _NO_ACL:
            return False
        raise
    return True


def copied_bits(file: int | str, mode: int) -> int:
    """The bits for chmod(2) of a copy of `file`, whose st_mode is `mode`. Raises OSError.

    As `file_bits`, but the owner of a copy may write if the owner of the file may, and execute.
    """
    special = mode & 0o7000
    return special | (mode & 0o700 if has_acl(file) else mode & 0o777)


def limit_read_bits(mode: int, inputs: Sequence[int]) -> int:
    """`mode` without the read bits that any mode of `inputs` lacks.

    So a file made from several others is not readable for anyone who may not read all of them.
    """
    return mode & (functools.reduce(operator.and_, inputs) | ~0o444)
