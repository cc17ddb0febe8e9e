"""Open descriptors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def opened_below(directory: Path) -> set[str]:
    """The files in the directory that this process has open, by path relative to it."""
    paths = (Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    targets = [os.readlink(path) for path in paths if path.is_symlink()]
    prefix = f"{directory}/"
    return {target.removeprefix(prefix) for target in targets if target.startswith(prefix)}
