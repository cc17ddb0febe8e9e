"""Map entries of a view: its segments, and by one scan which written pages are zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from diffmergefs.core.errors import failures
from diffmergefs.core.extents import split
from diffmergefs.core.layer import Layer
from diffmergefs.core.sparse import BLOCK
from diffmergefs.core.view import MergedView
from diffmergefs.core.workers import Progress


class MapEntry(NamedTuple):
    """The non-empty byte range `[start, stop)` that `layer` supplies, or no layer (None: a hole).

    `zero`: the bytes are known to be zeros, because of a hole or a scan.
    """

    start: int
    stop: int
    layer: int | None
    zero: bool


def entries(view: MergedView, start: int, stop: int) -> Iterator[MapEntry]:
    """The entries of `[start, stop)`, a range of the image, in order. Nothing is read."""
    for segment in view.segments(start, stop - start):
        yield MapEntry(*segment, segment.layer is None)


def scanned_entries(
    view: MergedView, start: int, stop: int, page: int, progress: Progress
) -> Iterator[MapEntry]:
    """Like `entries`, with written pages of zeros as entries of their own.

    Each byte that a layer supplies to the range is read once, holes are not. A page is `page`
    bytes, a power of two, but 1 MiB at most; where layers share a page, each part is judged by
    itself. Neighbours that are alike are joined. After each segment its layer is compared with its
    fingerprint (law 6). Raises LayerChangedError and FileAccessError.
    """
    for begin, end, number in view.segments(start, stop - start):
        if number is None:
            yield MapEntry(begin, end, None, True)
            continue
        layer = view.layers[number]
        judged = _judged(layer, begin, end, min(page, BLOCK), progress)
        for first, last, zero in _joined(judged):
            yield MapEntry(first, last, number, zero)
        with failures(layer.path):
            layer.check_unchanged()


def _judged(
    layer: Layer, start: int, stop: int, page: int, progress: Progress
) -> Iterator[tuple[int, int, bool]]:
    # In blocks with borders on pages, except for the segment's own. `startswith` compares without a
    # copy, and stops at the first byte that differs.
    buffer = bytearray(min(BLOCK, stop - start))
    zeros = bytes(len(buffer))
    for position, end in split(start, stop, BLOCK):
        with failures(layer.path):
            layer.read_into(memoryview(buffer)[: end - position], position)
        progress(end - position)
        if buffer.startswith(zeros[: end - position]):
            yield position, end, True
        else:
            for first, last in split(position, end, page):
                is_zero = buffer.startswith(zeros[: last - first], first - position)
                yield first, last, is_zero


def _joined(ranges: Iterator[tuple[int, int, bool]]) -> Iterator[tuple[int, int, bool]]:
    start, stop, zero = next(ranges)
    for first, last, other in ranges:
        if other != zero:
            yield start, stop, zero
            start, zero = first, other
        stop = last
    yield start, stop, zero
