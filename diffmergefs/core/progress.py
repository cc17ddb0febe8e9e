"""How long work reports its progress: by the bytes done since the last report."""

from __future__ import annotations

from collections.abc import Callable

#: Called again and again while work goes on, each time with the bytes done since the last call.
Progress = Callable[[int], None]


def ignore_progress(count: int) -> None:
    """The `Progress` of a caller that does not need to know."""
