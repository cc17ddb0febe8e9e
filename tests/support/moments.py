"""Servers that kill themselves at a moment that the test picks: a call of a function."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.live import patch_children, until

# In the child: each function looks, before or after its work, whether it shall die of it now. The
# file says how many calls go by before, and how many servers die of it.
_CODE = """
import functools, importlib, inspect, os, signal

def die_if_asked(path):
    try:
        with open(path, "r+") as file:
            skip, deaths = map(int, file.read().split())
            if skip == 0 and deaths == 1:
                os.unlink(path)
            else:
                file.seek(0)
                file.truncate()
                file.write(f"{skip - 1} {deaths}" if skip else f"0 {deaths - 1}")
    except (FileNotFoundError, ValueError):  # ValueError: another thread is at it
        return
    if skip == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def make_deadly(where, path, after):
    module, _, names = where.partition(":")
    owner = importlib.import_module(module)
    *way, name = names.split(".")
    for part in way:
        owner = getattr(owner, part)
    real = getattr(owner, name)
    if inspect.iscoroutinefunction(real):
        @functools.wraps(real)
        async def wrapped(*arguments, **named):
            if not after:
                die_if_asked(path)
            result = await real(*arguments, **named)
            if after:
                die_if_asked(path)
            return result
    else:
        @functools.wraps(real)
        def wrapped(*arguments, **named):
            if not after:
                die_if_asked(path)
            result = real(*arguments, **named)
            if after:
                die_if_asked(path)
            return result
    setattr(owner, name, wrapped)

"""


#: For `patch_children`: the lines that follow, indented, are for daemons only.
IN_MOUNTS = """
import sys
if "mount" in sys.orig_argv:
"""


class Moments:
    """Moments by name: `before` or `after` a function, as 'before package.module:Class.name'.

    `patch` holds for the processes that are started from now on.
    """

    def __init__(self, folder: Path, moments: Mapping[str, str]) -> None:
        folder.mkdir()
        self._folder = folder
        self._moments = moments

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        lines = [
            f"make_deadly({where!r}, {str(self._folder / name)!r}, {when == 'after'})"
            for name, text in self._moments.items()
            for when, _, where in [text.partition(" ")]
        ]
        # Only the daemon: other programs import nothing of it.
        body = "\n    ".join(lines)
        patch_children(patch, self._folder / "site", f"{_CODE}{IN_MOUNTS}    {body}\n")

    def arm(self, name: str, *, skip: int = 0, deaths: int = 1) -> None:
        """Have so many servers die when they come there, after `skip` calls that go by."""
        new = self._folder / "new"
        new.write_text(f"{skip} {deaths}", encoding="ascii")
        new.rename(self._folder / name)

    def wait(self, name: str) -> None:
        """Wait until they have died."""
        until(lambda: not (self._folder / name).exists(), f"no server came to {name!r}")

    def disarm(self, name: str) -> bool:
        """Whether it is still armed; no server dies of it any more."""
        try:
            os.unlink(self._folder / name)
        except FileNotFoundError:
            return False
        return True
