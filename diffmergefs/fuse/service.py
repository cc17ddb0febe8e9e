"""Who serves a mount: the keeper, its present server, and those before."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from diffmergefs.system.line import Line


@dataclass(frozen=True, kw_only=True)
class Service:
    """Who serves a mount.

    `keeper` is the process that signals go to, `server` the one that answers, the last of `servers`
    that were started. `last_end` says how the one before ended. `longest_stall_seconds` is the
    longest time from the end of one server until the next one answered. With `covered` another
    server goes on if this one dies; otherwise `obstacle` says why not.
    """

    keeper: int = field(default_factory=os.getpid)
    server: int = field(default_factory=os.getpid)
    servers: int = 1
    last_end: str = ""
    longest_stall_seconds: float = 0
    covered: bool = False
    obstacle: str = "it has no keeper"

    @classmethod
    def of(cls, line: Line, *, resends: bool) -> Service:
        """The service that `line` is of. `resends` is that of the device."""
        obstacle = "" if line.is_held else "its keeper is gone"
        if not resends:
            obstacle = "Linux before 6.9"
        return cls(
            keeper=line.keeper,
            servers=line.number,
            last_end=line.reason,
            longest_stall_seconds=line.board["longest_ns"] / 1e9,
            covered=not obstacle,
            obstacle=obstacle,
        )
