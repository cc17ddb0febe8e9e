"""The kernel's own map of a file (FIEMAP), and what happens around a call for it."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from typing import Any

import pytest

_FIEMAP = 0xC020660B
_COUNT = struct.Struct("=24xI")  # for how many extents the caller has room, in struct fiemap


def around_map(
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Call `before` and `after` around each call for extents of a map from now on.

    A call without room for any only asks whether there is a map, and is left alone.
    """
    real = fcntl.ioctl

    def ioctl(fd: int, code: int, *rest: Any) -> Any:
        if code != _FIEMAP or not _COUNT.unpack_from(rest[0])[0]:
            return real(fd, code, *rest)
        before()
        try:
            return real(fd, code, *rest)
        finally:
            after()

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


def without_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on walks find no map, as on tmpfs and NFS."""

    def refuse() -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    around_map(monkeypatch, refuse)
