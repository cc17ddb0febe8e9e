"""The descriptors that a process was started with: which are meant for it, and closing the rest."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterable, MutableMapping

_BY_PATH = re.compile(r"/(?:dev|proc/[^/]+(?:/task/[^/]+)?)/fd/(\d+)")
_FIRST = 3  # sd_listen_fds(3)

_MOST = 1 << 20  # fs.nr_open, as Linux has it unless it is told otherwise


def close_all_but(kept: Iterable[int]) -> None:
    """Close every descriptor above 2 that is not among `kept`."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    end = _MOST if hard == resource.RLIM_INFINITY else max(hard, _MOST)
    low = 3
    for fd in sorted({fd for fd in kept if low <= fd < end}):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, end)


def named_in(arguments: Iterable[str]) -> set[int]:
    """The descriptors that paths in these arguments name, as `/dev/fd/5` does."""
    return {int(n) for argument in arguments for n in _BY_PATH.findall(argument)}


def handed_over(environment: MutableMapping[str, str]) -> set[int]:
    """Those that a service manager gave this process, by sd_listen_fds(3).

    The variables are taken out of `environment`, so that no child takes itself to be meant.
    """
    count = environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    is_ours = environment.pop("LISTEN_PID", "") == str(os.getpid())
    if not is_ours or not re.fullmatch("[0-9]{1,6}", count):
        return set()
    return set(range(_FIRST, _FIRST + int(count)))
