"""A fork of the tests' own process."""

from __future__ import annotations

import os
import warnings


def fork() -> int:
    """As os.fork(2), in a process in which other tests may have left threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()
