"""The descriptors of this process."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable

_MOST = 1 << 20  # fs.nr_open, as Linux has it unless it is told otherwise


def close_all_but(kept: Iterable[int]) -> None:
    """Close every descriptor above 2 that is not among `kept`."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    end = _MOST if hard == resource.RLIM_INFINITY else max(hard, _MOST)
    low = 3
    for fd in sorted({fd for fd in kept if fd >= low}):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, end)
