"""Processes of the machine."""

from __future__ import annotations

import os
from pathlib import Path


def processes_with(argument: Path, program: str | None = None) -> list[int]:
    """The processes that have this argument; only those of this program, if it is given."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            arguments = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        is_it = program is None or os.path.basename(arguments[0]) == os.fsencode(program)
        if is_it and os.fsencode(argument) in arguments:
            found.append(int(name))
    return found
