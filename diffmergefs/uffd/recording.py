"""Working sets of VMs: recorded from their faults, and loaded to be copied ahead."""

from __future__ import annotations

import logging
import threading

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.extents import PAGE, Extent
from diffmergefs.core.identity import FileKey
from diffmergefs.core.view import MergedView
from diffmergefs.prefetch.push import pieces
from diffmergefs.prefetch.record import Identity, WorkingSets, identity_of_view
from diffmergefs.prefetch.recorder import Touches, save_touches

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
        if not any(map(len, touches)) or any(layer.tainted for layer in view.layers):
            log.info("%s: not recorded: nothing was touched, or a layer changed", name)
            return
        save_touches(self._sets, view, touches, PAGE >> 10)


class Ahead:
    """The pieces of the image's working set, in order, for each VM that connects.

    Each is at most 256 KiB. There are none, with a line in the log, if the record cannot be used.
    It is read at the start, and again only when it has changed: a VM waits meanwhile. Safe to use
    from several threads.
    """

    def __init__(self, sets: WorkingSets, view: MergedView) -> None:
        self._sets = sets
        self._view = view
        self._known: tuple[FileKey | None, list[Extent]] = (None, [])
        self()

    def __call__(self) -> list[Extent]:
        """The pieces now."""
        name = self._view.layers[-1].path
        try:
            identity = identity_of_view(self._view)
            key = self._sets.key(identity)
            known, found = self._known
            if key != known:
                found = self._read(identity, name)
                self._known = key, found
        except (DiffMergeError, OSError) as error:
            log.warning("%s: nothing is copied ahead: %s", name, error)
            return []
        return found

    def _read(self, identity: Identity, name: str) -> list[Extent]:
        record = self._sets.load(identity)
        if record is None:
            return []
        if reason := record.stale(identity):
            log.info("%s: nothing is copied ahead: the record is stale: %s", name, reason)
            return []
        return pieces(record.ranges, self._view.size)
