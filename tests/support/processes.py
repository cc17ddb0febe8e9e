"""Processes of the machine."""

from __future__ import annotations

import os
from pathlib import Path


def daemons_of(path: Path) -> list[int]:
    """The processes that have this path among their arguments."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            arguments = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(path) in arguments:
            found.append(int(name))
    return found
