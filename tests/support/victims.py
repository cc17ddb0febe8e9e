"""A `flatten` in a child process, to be killed at any moment."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import signal
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.writing.flatten import flatten
from diffmergefs.writing.output import OutputFile

#: What a run goes through, in this order.
PHASES = ("opening", "copying", "syncing", "naming", "closing")
ENDED = len(PHASES)

_TIMES = struct.Struct(f"={ENDED + 1}d")
_PATIENCE_SECONDS = 60


def open_view(layers: Sequence[Path]) -> MergedView:
    """The view of these layers, base first."""
    return MergedView([Layer.open(str(path)) for path in layers])


class Victim:
    """A child that flattens the layers to `out`, and tells in shared memory how far it is.

    Without `unnamed` its filesystem has no O_TMPFILE. `kill_itself` names a function of `os`
    right after whose first call for the output the child kills itself.
    """

    def __init__(
        self,
        layers: Sequence[Path],
        out: Path,
        *,
        force: bool,
        unnamed: bool,
        kill_itself: str | None = None,
    ) -> None:
        self._shared = mmap.mmap(-1, 1 + _TIMES.size)
        self._times = [time.monotonic()] + [0.0] * ENDED
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                self._instrument(unnamed, kill_itself)
                with open_view(layers) as view:
                    flatten(view, out, force=force)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                self._mark(ENDED)
                os._exit(status)

    @property
    def phase(self) -> int:
        """The number of the phase that it has reached."""
        return self._shared[0]

    def durations(self) -> list[float]:
        """The seconds that each phase took, of a run that was not killed."""
        times = _TIMES.unpack_from(self._shared, 1)
        starts = [self._times[0], *times[1:]]
        return [max(0.0, b - a) for a, b in itertools.pairwise(starts)]

    def wait(self) -> int:
        """Its exit status; minus the signal that ended it."""
        if self.status is None:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
                if time.monotonic() > deadline:
                    os.kill(self.pid, signal.SIGKILL)
                    raise AssertionError(f"the child hung in phase {self.phase}")
                time.sleep(0.0005)
            self.status = os.waitstatus_to_exitcode(ended[1])
        return self.status

    def kill(self, dice: random.Random, durations: Sequence[float]) -> int:
        """Kill it at a random moment of a phase taken at random; the phase it died in.

        `durations` are those of a run that was not killed. It may have ended before: then ENDED.
        """
        aim = dice.randrange(ENDED)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self.phase < aim and time.monotonic() < deadline:
            pass
        # Not slept: a phase may be over in less time than it takes to wake up.
        until = time.monotonic() + dice.random() * durations[aim]
        while time.monotonic() < until:
            pass
        os.kill(self.pid, signal.SIGKILL)
        return ENDED if self.wait() == 0 else self.phase

    def _mark(self, phase: int) -> None:
        self._times[phase] = time.monotonic()
        _TIMES.pack_into(self._shared, 1, *self._times)
        self._shared[0] = phase

    def _instrument(self, unnamed: bool, kill_itself: str | None) -> None:
        for owner, name, phase in (
            (os, "ftruncate", "copying"),
            (OutputFile, "finish", "syncing"),
            (OutputFile, "publish", "naming"),
            (OutputFile, "__exit__", "closing"),
        ):
            self._mark_before(owner, name, PHASES.index(phase))
        if not unnamed:
            os.open = _refusing_tmpfile(os.open)
        if kill_itself:
            self._kill_after(kill_itself)

    def _mark_before(self, owner: object, name: str, phase: int) -> None:
        real = getattr(owner, name)

        def marked(*args: Any, **named: Any) -> Any:
            self._mark(phase)
            return real(*args, **named)

        setattr(owner, name, marked)

    def _kill_after(self, name: str) -> None:
        # Layers are opened and synced too, in the first phase.
        real = getattr(os, name)

        def deadly(*args: Any, **named: Any) -> Any:
            result = real(*args, **named)
            if name == "open":
                creates = args[1] & (os.O_CREAT | os.O_TMPFILE)
                if not creates & (os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY):
                    return result
            elif self.phase == 0:
                return result
            os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, deadly)


def _refusing_tmpfile(real: Callable[..., int]) -> Callable[..., int]:
    def refusing(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest, **named)

    return refusing
