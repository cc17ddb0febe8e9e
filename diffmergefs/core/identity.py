"""Which file, with which content, as far as metadata tell."""

from __future__ import annotations

import os
from typing import NamedTuple


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
