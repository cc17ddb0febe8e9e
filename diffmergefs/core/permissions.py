"""The permission bits of a file that a mirror or a copy of it can have."""

from __future__ import annotations

import errno
import os
import stat

_NO_ACL = frozenset({errno.ENODATA, errno.EOPNOTSUPP})


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
