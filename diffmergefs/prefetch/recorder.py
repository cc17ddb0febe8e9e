"""Recording: the first touches of each image among its requests, saved at its last close."""

from __future__ import annotations

import functools
import heapq
import itertools
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.extents import PAGE, Extent
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.handles import Observer
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.prefetch.push import limited
from diffmergefs.prefetch.record import MAX_RANGES, WorkingSet, WorkingSets, identity_of_view, now

log = logging.getLogger(__name__)

_FEWEST_JUMPS = 16
_JUMPS_OF = 8  # if a guest runs, at least one request in this many is a jump
_WINDOW = 8 << 20
_WINDOW_OF = 16


class Touches:
    """The requests of one open file, as runs of pages in the order of arrival.

    A restored guest touches its memory in random places. A reader that copies or hashes a file goes
    through it in order: parallel requests may overtake each other, but all are near the furthest so
    far. A request that is not near it is a jump. Takes 16 bytes per run.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._window = min(_WINDOW, size // _WINDOW_OF)
        self._starts, self._stops = array("Q"), array("Q")
        self._requests = self._jumps = self._furthest = 0

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Extent]:
        return map(Extent, self._starts, self._stops)

    def add(self, offset: int, length: int) -> int:
        """Add a request, and return how many runs that added: 0 if it continues the last run."""
        start = offset // PAGE * PAGE
        stop = min(-(-(offset + length) // PAGE) * PAGE, self._size)
        if start >= stop:
            return 0
        self._requests += 1
        self._jumps += abs(start - self._furthest) > self._window
        self._furthest = max(self._furthest, stop)
        if self._stops and self._stops[-1] == start:
            self._stops[-1] = stop
            return 0
        self._starts.append(start)
        self._stops.append(stop)
        return 1

    @property
    def is_restore(self) -> bool:
        """Whether the requests look like a running guest, not like a sequential or short reader."""
        return self._jumps >= max(_FEWEST_JUMPS, self._requests / _JUMPS_OF)


def first_touches(runs: Iterable[Extent]) -> list[Extent]:
    """Each byte of the runs once, at its first place: disjoint ranges in the order of the runs."""
    # A sweep over the borders by address: the earliest of the runs that are open has the bytes.
    numbered = list(enumerate(runs))
    borders = sorted({border for _, run in numbered for border in run})
    waiting = sorted((run.start, number, run.stop) for number, run in numbered)[::-1]
    opened: list[tuple[int, int]] = []
    found: list[tuple[int, int, int]] = []
    for start, stop in itertools.pairwise(borders):
        while waiting and waiting[-1][0] <= start:
            _, number, end = waiting.pop()
            heapq.heappush(opened, (number, end))
        while opened and opened[0][1] <= start:
            heapq.heappop(opened)
        if opened:
            number = opened[0][0]
            if found and found[-1][0] == number and found[-1][2] == start:
                found[-1] = (number, found[-1][1], stop)
            else:
                found.append((number, start, stop))
    return [Extent(start, stop) for _, start, stop in sorted(found)]


def save_touches(
    sets: WorkingSets, view: MergedView, files: Iterable[Touches], readahead_kib: int | None
) -> None:
    """Save the first touches of these files of the view as its record, and log it.

    At most `record.MAX_RANGES` ranges are saved. Raises DiffMergeError, OSError.
    """
    runs = [run for touches in files for run in touches]
    ranges = limited(first_touches(runs), view.size)[:MAX_RANGES]
    record = WorkingSet(identity_of_view(view), tuple(ranges), now(), readahead_kib)
    path = sets.save(record)
    log.info(
        "%s: recorded the first touch of %d bytes in %d ranges: %s",
        view.layers[-1].path,
        record.touched_bytes,
        len(ranges),
        path,
    )


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
        save_touches(self._sets, view, restores, self._readahead_kib)
