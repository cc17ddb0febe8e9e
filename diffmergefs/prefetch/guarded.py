"""The way of `mount --prefetch=notify`, taken only while a guard watches over the daemon."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence

from diffmergefs.core.extents import Extent
from diffmergefs.prefetch.prefetcher import Notify, Push, Way

log = logging.getLogger(__name__)


class GuardedNotify:
    """A `prefetch.Way`: `notify`, once `start_guard` has succeeded, or else `otherwise`.

    A daemon that is killed in mid-push could leave its readers waiting for ever. The guard is
    started when there is something to push, so that a mount without records has none;
    `start_guard` raises OSError where it cannot be had, which the log says.
    """

    def __init__(self, notify: Notify, otherwise: Way, start_guard: Callable[[], None]) -> None:
        self._notify = notify
        self._otherwise = otherwise
        self._start_guard = start_guard
        self._chosen: Way | None = None

    def bring(self, push: Push, wanted: Sequence[Extent]) -> Generator[int, None, None]:
        if self._chosen is None:
            self._chosen = self._choose()
        yield from self._chosen.bring(push, wanted)

    def is_own(self, pid: int) -> bool:
        return self._otherwise.is_own(pid)

    def _choose(self) -> Way:
        try:
            self._start_guard()
        except OSError as error:
            log.info(
                "--prefetch=fadvise takes the place of notify: if the daemon were killed in the"
                " middle of it, nobody could tell the kernel to end the mount: %s",
                error,
            )
            return self._otherwise
        return self._notify
