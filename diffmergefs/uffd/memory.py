"""The memory of one VM: which pages it has, and what goes into those that it asks for."""

from __future__ import annotations

import errno
import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.extents import PAGE
from diffmergefs.core.view import HOLE, MergedView
from diffmergefs.uffd import userfault
from diffmergefs.uffd.regions import Region
from diffmergefs.uffd.status import Counters
from diffmergefs.uffd.userfault import Pending, Room, Userfault

#: The most that is copied ahead between two looks at the faults, unless one page is larger.
PIECE = 256 << 10

# What is known of a page. `_MISSING` takes its bytes from the image. `_GIVEN` was put in place: if
# it faults nevertheless, the guest gave it away, and it reads as zeros. `_REMOVED` was given away
# by an event.
_MISSING, _GIVEN, _REMOVED = 0, 1, 2
_OF_MISSING = bytes((_MISSING,))


class Unservable(Exception):
    """A page cannot be put in place; the text says why, in one line."""


class Ended(Exception):
    """The process whose memory it is has ended."""


class _Area:
    # A region, and a byte for each of its pages.

    def __init__(self, region: Region) -> None:
        self.start, self.size, self.offset, self.page = region
        self.end = region.end
        self.states = bytearray(self.size // self.page)

    def run(self, number: int, around: int) -> tuple[int, int]:
        """The pages about this one that are in the same state, within its block of `around`."""
        first = number - number % around
        states = self.states[first : first + around]
        known, at = states[number - first : number - first + 1], number - first
        before, after = states[:at], states[at:]
        start = number - (len(before) - len(before.rstrip(known)))
        return start, number + (len(after) - len(after.lstrip(known)))

    def mark(self, start: int, stop: int, state: int) -> None:
        """Note the state of the pages `[start, stop)`."""
        self.states[start:stop] = bytes((state,)) * (stop - start)


class Memory:
    """The memory of one VM, filled from `view`. Use it from one thread only.

    That thread reads the events and puts the pages in place, so neither happens during the other: a
    page that was read from the image cannot be put in place after the guest gave it away. `around`
    is how many bytes about a fault are put in place with it.
    """

    def __init__(
        self,
        view: MergedView,
        regions: list[Region],
        source: Userfault,
        around: int,
        counters: Counters,
    ) -> None:
        self._view = view
        self._source = source
        self._counters = counters
        self._around = around
        self._areas = [_Area(region) for region in sorted(regions)]
        self._starts = [area.start for area in self._areas]
        self._most = max(around, PIECE, *(region.page for region in regions))
        self._room = Room(self._most)
        self._zeros: Room | None = None
        self._waiting: deque[int] = deque()
        #: Called with offset and length in the image of what is put in place for a fault.
        self.touched: Callable[[int, int], object] | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether a fault could not be served yet: call `serve` again soon."""
        return bool(self._waiting)

    def serve(self) -> None:
        """Act on all events that wait, and serve their faults.

        Raises Unservable, Ended. Pages that the guest gave away are noted before anything else is
        done, because reading their event lets the guest go on.
        """
        self._take()
        waiting = self._waiting
        while waiting:
            began = time.perf_counter_ns()
            try:
                self._fault(waiting[0])
            except Pending:
                # It cannot be put in place before the event is read, and the guest has gone on.
                self._counters.retries += 1
                self._take()
                return
            waiting.popleft()
            self._counters.fault(time.perf_counter_ns() - began)

    def _take(self) -> None:
        try:
            events = self._source.events()
        except OSError as error:
            raise Unservable(f"the events of its memory: {error.strerror}") from error
        for kind, first, second, _ in events:
            if kind == userfault.PAGEFAULT:
                if first & userfault.OTHER_FAULTS:
                    raise Unservable(f"a fault with the flags {first:#x}, which is not supported")
                self._waiting.append(second)
            elif kind in (userfault.REMOVE, userfault.UNMAP):
                self._remove(first, second)
            else:
                if kind == userfault.FORK:
                    os.close(first & 0xFFFFFFFF)  # the child's own, which came with the event
                raise Unservable(f"an event of kind {kind:#x}, which is not supported")

    def _remove(self, start: int, end: int) -> None:
        for area in self._areas:
            low, high = max(start, area.start), min(end, area.end)
            if low < high:
                first = (low - area.start) // area.page
                last = -(-(high - area.start) // area.page)
                area.mark(first, last, _REMOVED)
                self._counters.removed_bytes += (last - first) * area.page

    def _fault(self, address: int) -> None:
        number = bisect_right(self._starts, address) - 1
        area = self._areas[number]
        if number < 0 or address >= area.end:
            raise Unservable(f"a fault at {address:#x}, which is in no region")
        page = area.page
        number = (address - area.start) // page
        state = area.states[number]
        if state == _GIVEN or self._around <= page:
            start, stop = number, number + 1
        else:
            start, stop = area.run(number, self._around // page)
        if state == _MISSING:
            if self.touched is not None:
                self.touched(area.offset + start * page, (stop - start) * page)
            # A block has room at once: `around` bytes, or a page.
            self._give_at_once(area, start, stop)
        else:
            self._zero(area, start, stop)

    def ahead(self, offset: int, stop: int) -> None:
        """Put pages of the range `[offset, stop)` of the image in place that are still missing.

        Raises Pending if the range must be tried again, Unservable, Ended.
        """
        for area in self._areas:
            low = max(offset, area.offset) - area.offset
            high = min(stop, area.offset + area.size) - area.offset
            first, last = low // area.page, -(-high // area.page)
            while (number := area.states.find(_MISSING, first, max(first, last))) >= 0:
                rest = area.states[number:last]
                first = number + len(rest) - len(rest.lstrip(_OF_MISSING))
                self._give(area, number, first)
                self._counters.ahead_bytes += (first - number) * area.page

    def _give(self, area: _Area, start: int, stop: int) -> None:
        # Pages with the bytes of the image.
        at_once = self._most // area.page
        for first in range(start, stop, at_once):
            self._give_at_once(area, first, min(stop, first + at_once))

    def _give_at_once(self, area: _Area, start: int, stop: int) -> None:
        # As many pages as there is room for.
        page, room = area.page, self._room
        supplied: dict[int, int] = {}
        buffer = room.buffer[: (stop - start) * page]
        try:
            self._view.fill(buffer, area.offset + start * page, supplied)
        except (DiffMergeError, OSError) as error:
            raise Unservable(str(error)) from error
        if HOLE not in supplied or page != PAGE:
            self._put(area, start, stop, room.address)
        else:
            for first, last, is_hole in self._parts(area, start, stop):
                if is_hole:
                    self._zero(area, first, last)
                else:
                    self._put(area, first, last, room.address + (first - start) * page)
        self._counters.supply(supplied)

    def _parts(self, area: _Area, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        # Runs of pages, and whether they are holes in all layers.
        begin, place = area.offset, start
        for low, high, layer in self._view.segments(begin + start * PAGE, (stop - start) * PAGE):
            first, last = -(-(low - begin) // PAGE), (high - begin) // PAGE
            if layer is None and first < last:
                if place < first:
                    yield place, first, False
                yield first, last, True
                place = last
        if place < stop:
            yield place, stop, False

    def _zero(self, area: _Area, start: int, stop: int) -> None:
        page = area.page
        if page == PAGE:
            self._put(area, start, stop, None)
            return
        if self._zeros is None:
            self._zeros = Room(page)
        for number in range(start, stop):
            self._put(area, number, number + 1, self._zeros.address)

    def _put(self, area: _Area, start: int, stop: int, source: int | None) -> None:
        # The pages from our memory, or zeros. A page that is there already stays as it is.
        page = area.page
        while start < stop:
            target, length = area.start + start * page, (stop - start) * page
            try:
                if source is None:
                    done = self._source.zero(target, length)
                else:
                    done = self._source.copy(target, source, length)
                if not done:
                    self._source.wake(target, page)
            except OSError as error:
                raise _failure(error, target) from error
            if done == length and stop - start == 1:
                area.states[start] = _GIVEN
                number = 1
            else:
                number = done // page or 1
                area.mark(start, start + number, _GIVEN)
            if source is None:
                self._counters.zero_bytes += done
            else:
                self._counters.copied_bytes += done
                source += number * page
            start += number


def _failure(error: OSError, address: int) -> Exception:
    if error.errno == errno.ESRCH:
        return Ended()
    return Unservable(f"the kernel puts no page at {address:#x}: {error.strerror}")
