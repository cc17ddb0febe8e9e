"""Directories that refuse even lstat(2): FUSE mounts of somebody else's, or without a server."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import mounttable, skips

#: The errno's name, and whose the mount is, which matters only while it has a server.
KINDS = {"EACCES": 12345, "ENOTCONN": 0}


@contextmanager
def refusing(place: Path, kind: str) -> Iterator[None]:
    """A mount on the directory `place` that answers each lstat with this error, one of KINDS."""
    skips.require_mounts()
    skips.require_fuse()
    user = KINDS[kind]
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    real = os.path.realpath(place)
    try:
        # Not by mount(8), which in Debian 13 looks at what it has mounted, and is refused.
        options = f"fd={device},rootmode=40000,user_id={user},group_id={user}".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"none", os.fsencode(real), b"fuse", 0, options) != 0:
            raise OSError(ctypes.get_errno(), "a FUSE filesystem cannot be mounted", real)
        if kind == "ENOTCONN":
            os.close(device)
            device = -1
        yield
    finally:
        if device >= 0:
            os.close(device)
        mounttable.unmount_below(real)
