"""Processes of the machine."""

from __future__ import annotations

import os
import time
from contextlib import suppress
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


def children_of(parent: int) -> list[int]:
    """The live processes that this one started, the last one last.

    (/proc's own list of children may leave some out.)
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            facts = _facts(path)
            if int(facts[1]) == parent and facts[0] not in "ZX":
                found.append((int(facts[19]), int(path.parent.name)))
    return [pid for _, pid in sorted(found)]


def is_dead(pid: int) -> bool:
    """Whether the process is gone, or only waits for its parent to notice."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return _facts(Path(f"/proc/{pid}/stat"))[0] in "ZX"
    return True


def is_stuck(pid: int) -> bool:
    """Whether a thread waits in the kernel for what no signal ends."""
    states = []
    for _ in range(2):
        states.append(
            {
                task.name
                for task in Path(f"/proc/{pid}/task").iterdir()
                if (task / "stat").read_text().rpartition(")")[2].split()[0] == "D"
            }
        )
        time.sleep(0.1)
    return bool(states[0] & states[1])


def has_no_thread(pid: int) -> bool:
    """Whether nothing is left of a dead process but its leader, if at all."""
    with suppress(FileNotFoundError):
        return os.listdir(f"/proc/{pid}/task") == [str(pid)]
    return True


def keeper_with(argument: Path) -> int:
    """The one process with this argument that none of the others with it started."""
    found = set(processes_with(argument))
    (keeper,) = found - {child for pid in found for child in children_of(pid)}
    return keeper


def _facts(stat: Path) -> list[str]:
    # State, parent and so on: proc(5), from field 3.
    return stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
