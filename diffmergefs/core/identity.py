"""Is it the same file still? Four identities, each made from stat(2); and permission bits.

They differ in what may happen to a file that still counts as the same:

- `FileKey`: the same content. A rename, a chmod and a new link keep it. Use it to recognise
  content that was seen before: open layers, hashes, chains.
- `FileVersion`: the same content, and nothing else was done to the file either. Use it where a
  file was only looked at and what it was then must still hold when it is used.
- `Fingerprint`: an open layer, whose device and inode cannot change. Use it to see after a read
  whether anyone wrote meanwhile. The block count shows what moves no time stamp.
- `diffmergefs.sidecars.verified.Identity`: a `FileVersion` under a path. Use it for what is stored
  for later runs: a path has one entry, and a changed file must never match an old one.

A program can set a file's mtime back, so a `FileKey` does not prove that the content is unchanged.
The other three contain the ctime, which only the kernel sets.
"""

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
    """The same content, as far as metadata show; a rename or a chmod keeps it."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileKey:
        """The key of the file with this status."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class FileVersion(NamedTuple):
    """A file exactly as it was seen: anything done to it makes another version."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileVersion:
        """The version of the file with this status."""
        return cls(*FileKey.of(status), status.st_ctime_ns)


class Fingerprint(NamedTuple):
    """What an open file's metadata were; any store that reaches the file moves one of these."""

    size: int
    mtime_ns: int
    ctime_ns: int
    blocks: int

    @classmethod
    def of(cls, fd: int) -> Fingerprint:
        """The fingerprint of the open file."""
        s = os.fstat(fd)
        return cls(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_blocks)


def file_bits(file: int | str, mode: int) -> int:
    """The permission bits that a mirror of `file`, whose st_mode is `mode`, can have.

    If the file has an ACL, only the owner's bits: 0400 of a file, 0700 of a directory. The group
    bits are then a mask, which grants nothing by itself, and a mirror has no ACL. Raises OSError.
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

    As `file_bits`, but the owner of the copy may also write and execute, as the file's owner may.
    """
    special = mode & 0o7000
    return special | (mode & 0o700 if has_acl(file) else mode & 0o777)


def limit_read_bits(mode: int, inputs: Sequence[int]) -> int:
    """`mode` without the read bits that any mode of `inputs` lacks.

    So a file made from several others is not readable for anyone who may not read all of them.
    """
    return mode & (functools.reduce(operator.and_, inputs) | ~0o444)
