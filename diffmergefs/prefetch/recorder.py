"""Recording: which pages each opened image was first asked for, written down at its last close."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.fuse.observer import Caller
from diffmergefs.prefetch.record import MAX_RANGES, WorkingSet, WorkingSets, identity_of_view, now
from diffmergefs.prefetch.touches import Touches, first_touches, limited

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Session:
    # From an image's first open to its last close; `runs` counts those of all its files.
    image: OpenImage
    files: dict[int, Touches] = field(default_factory=dict)
    opened: set[int] = field(default_factory=set)
    runs: int = 0


class Recorder:
    """An `Observer` that writes a working set for each image that a guest ran from.

    Files that were read in order, or hardly at all, leave nothing. The first open of an image has
    the kernel drop what it still has of it, or the record would lack that; the touches of files
    that are open together go into one record, by the order of their opening. At most
    `record.MAX_RANGES` runs are kept of an image (4 MiB); what comes after them is not
    recorded.
    """

    pushed_bytes = hit_bytes = 0

    def __init__(self, sets: WorkingSets) -> None:
        self._readahead_kib: int | None = None
        self._sets = sets
        self._sessions: dict[OpenImage, _Session] = {}
        self._files: dict[int, tuple[_Session, Touches]] = {}

    def opened(
        self, file: int, inode: int, image: OpenImage, caller: Caller, *, writing: bool
    ) -> bool:
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
            # So that many who only glance at it take no memory while one file stays open.
            del session.files[file]
            session.runs -= len(touches)
        if session.opened:
            return None
        del self._sessions[session.image]
        return functools.partial(self._save, session)

    def stop(self, seconds: float) -> bool:
        """Write down what is still open, as far as it was touched; the time is not kept to."""
        sessions, self._sessions = list(self._sessions.values()), {}
        self._files.clear()
        for session in sessions:
            self._save(session)
        return True

    def ready(self, readahead_kib: int | None) -> None:
        """Write this readahead into each record."""
        self._readahead_kib = readahead_kib

    def close(self) -> None:
        pass

    def _save(self, session: _Session) -> None:
        try:
            self._write(session)
        except (DiffMergeError, OSError) as error:
            log.warning("the record of a working set cannot be written: %s", error)
        except Exception:
            log.exception("writing a working set failed: this is a bug")

    def _write(self, session: _Session) -> None:
        view = session.image.view
        name = view.layers[-1].path
        restores = [touches for touches in session.files.values() if touches.is_restore]
        if not restores:
            log.info("%s: not recorded: it was read in order, or hardly at all", name)
            return
        if any(layer.tainted for layer in view.layers):
            log.info("%s: not recorded: a layer of it changed", name)
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
