"""Recording: the first touches of each image, saved at its last close."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.fuse.handles import Observer
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.prefetch.record import MAX_RANGES, WorkingSet, WorkingSets, identity_of_view, now
from diffmergefs.prefetch.touches import Touches, first_touches, limited

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Session:
    # From an image's first open to its last close. `runs` counts the runs of all its files.
    image: OpenImage
    files: dict[int, Touches] = field(default_factory=dict)
    opened: set[int] = field(default_factory=set)
    runs: int = 0


class Recorder(Observer):
    """An `Observer` that records a working set for each image that a guest ran from.

    Files that were read in order, or of which little was read, leave no record. The first open of
    an image has the kernel drop its cached pages, or they would be missing in the record. The
    touches of files that are open at the same time share one record, in the order of the opens. At
    most `record.MAX_RANGES` runs (4 MiB) are kept of an image; later touches are not
    recorded.
    """

    def __init__(self, sets: WorkingSets) -> None:
        self._readahead_kib: int | None = None
        self._sets = sets
        self._sessions: dict[OpenImage, _Session] = {}
        self._files: dict[int, tuple[_Session, Touches]] = {}

    def opened(self, file: int, inode: int, image: OpenImage, pid: int, *, writing: bool) -> bool:
        session = self._sessions.get(image)
        is_first = session is None
        if session is None:
            session = self._sessions[image] = _Session(image)
        touches = session.files[file] = Touches(image.view.size)
        session.opened.add(file)
        self._files[file] = session, touches
        return not is_first

    def read(self, file: int, offset: int, length: int) -> None:
        known = self._files.get(file)
        if known is not None and known[0].runs < MAX_RANGES:
            known[0].runs += known[1].add(offset, length)

    def closed(self, file: int) -> Callable[[], object] | None:
        known = self._files.pop(file, None)
        if known is None:
            return None
        session, touches = known
        session.opened.discard(file)
        if not touches.is_restore:
            # Otherwise many short readers would take memory while one file stays open.
            del session.files[file]
            session.runs -= len(touches)
        if session.opened:
            return None
        del self._sessions[session.image]
        return functools.partial(self._save, session)

    def stop(self, seconds: float) -> bool:
        """Save what was touched of images that are still open. Ignores the time limit."""
        sessions, self._sessions = list(self._sessions.values()), {}
        self._files.clear()
        for session in sessions:
            self._save(session)
        return True

    def ready(self, readahead_kib: int | None) -> None:
        """Write this readahead into each record."""
        self._readahead_kib = readahead_kib

    def _save(self, session: _Session) -> None:
        try:
            self._write(session)
        except (DiffMergeError, OSError) as error:
            log.warning("cannot write the record of a working set: %s", error)
        except Exception:
            log.exception("writing a working set failed: this is a bug")

    def _write(self, session: _Session) -> None:
        view = session.image.view
        name = view.layers[-1].path
        restores = [touches for touches in session.files.values() if touches.is_restore]
        if not restores:
            log.info("%s: not recorded: it was read in order, or little was read", name)
            return
        if any(layer.tainted for layer in view.layers):
            log.info("%s: not recorded: one of its layers changed", name)
            return
        runs = [run for touches in restores for run in touches]
        ranges = limited(first_touches(runs), view.size)[:MAX_RANGES]
        record = WorkingSet(identity_of_view(view), tuple(ranges), now(), self._readahead_kib)
        path = self._sets.save(record)
        log.info(
            "%s: recorded the first touch of %d bytes in %d ranges: %s",
            name,
            record.touched_bytes,
            len(ranges),
            path,
        )
