"""Working sets of VMs: recorded from their faults, and loaded to be copied ahead."""

from __future__ import annotations

import logging
import threading

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.extents import PAGE, Extent
from diffmergefs.core.view import MergedView
from diffmergefs.prefetch.push import limited, pieces
from diffmergefs.prefetch.record import MAX_RANGES, WorkingSet, WorkingSets, identity_of_view, now
from diffmergefs.prefetch.recorder import Touches, first_touches

log = logging.getLogger(__name__)


class Recording:
    """Records a working set of `view` from all VMs that are connected at the same time.

    The record is written when the last of them has ended. Safe to use from several threads.
    """

    def __init__(self, sets: WorkingSets, view: MergedView) -> None:
        self._sets = sets
        self._view = view
        self._lock = threading.Lock()
        self._connected = 0
        self._touches: list[Touches] = []

    def begin(self) -> Touches:
        """A VM has connected: where its touches go."""
        touches = Touches(self._view.size)
        with self._lock:
            self._connected += 1
            self._touches.append(touches)
        return touches

    def end(self) -> None:
        """A VM has ended. After the last one, write the record; a failure is logged."""
        with self._lock:
            self._connected -= 1
            if self._connected:
                return
        self.save()

    def save(self) -> None:
        """Write the record of what was touched until now, and begin a new one."""
        with self._lock:
            touches, self._touches = self._touches, []
        try:
            self._write(touches)
        except (DiffMergeError, OSError) as error:
            log.warning("cannot write the record of a working set: %s", error)

    def _write(self, touches: list[Touches]) -> None:
        view = self._view
        name = view.layers[-1].path
        runs = [run for each in touches for run in each]
        if not runs or any(layer.tainted for layer in view.layers):
            log.info("%s: not recorded: nothing was touched, or a layer changed", name)
            return
        ranges = limited(first_touches(runs), view.size)[:MAX_RANGES]
        record = WorkingSet(identity_of_view(view), tuple(ranges), now(), PAGE >> 10)
        path = self._sets.save(record)
        log.info(
            "%s: recorded the first touch of %d bytes in %d ranges: %s",
            name,
            record.touched_bytes,
            len(ranges),
            path,
        )


def recorded(sets: WorkingSets, view: MergedView) -> list[Extent]:
    """The pieces of the image's working set, in order; none, with a line in the log, if unusable.

    Each is at most 256 KiB.
    """
    name = view.layers[-1].path
    try:
        identity = identity_of_view(view)
        record = sets.load(identity)
        reason = record.stale(identity) if record else None
    except (DiffMergeError, OSError) as error:
        log.warning("%s: nothing is copied ahead: %s", name, error)
        return []
    if record is None or reason:
        if reason:
            log.info("%s: nothing is copied ahead: the record is stale: %s", name, reason)
        return []
    return pieces(record.ranges, view.size)
