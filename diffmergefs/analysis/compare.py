"""`compare`: the pages in which two images differ; reads only what may differ."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

from diffmergefs.core.errors import VerificationError
from diffmergefs.core.extents import PAGE, ExtentList, split
from diffmergefs.core.failures import failures
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView, require_equal_size
from diffmergefs.core.workers import Progress, ignore_progress, in_order

# Two buffers of a block stay in the processor's cache, and one call reads enough.
_BLOCK = 256 << 10
_PART = 16 << 10
# The bytes per result: the step of progress, and of the work that processes share.
_WINDOW = 16 << 20


@dataclass(frozen=True)
class Comparison:
    """Two images of `size` bytes, compared.

    `first` is the offset of the first byte that differs, None if they are equal. `ranges` are the
    pages of `page_size` bytes that differ: they begin on pages, and end on pages or with the image.
    `compared_bytes` of each image had to be compared: elsewhere both have a hole, or the same range
    of the same layer file.
    """

    size: int
    page_size: int
    first: int | None
    ranges: ExtentList
    compared_bytes: int

    @property
    def equal(self) -> bool:
        """Whether the views hold the same bytes."""
        return self.first is None

    @property
    def differing_pages(self) -> int:
        """How many pages differ; an incomplete last page counts as one."""
        return count_pages(self.ranges, self.page_size)


class Window(NamedTuple):
    """The result for a part of two images: the pages that differ, and the bytes compared."""

    ranges: ExtentList
    compared_bytes: int


class Tile(NamedTuple):
    """A range in which two views take their bytes from different layers (None: from a hole)."""

    start: int
    stop: int
    a: int | None
    b: int | None


def compare(
    a: MergedView,
    b: MergedView,
    *,
    page_size: int = PAGE,
    jobs: int = 1,
    progress: Progress = ignore_progress,
) -> Comparison:
    """Compare two open images of one size, byte for byte.

    Nothing is read where both have a hole, or the same range of the same layer file. Where only one
    has a hole, the other is compared with zeros. `page_size` (a power of two, in bytes) is the unit
    of the result only. `jobs` processes share the work (see `workers.in_order`). `progress` is
    given `bytes_to_compare` in all. Each layer of both is compared with its fingerprint at the end
    (law 6); none is written. Blocks.

    Raises SizeMismatchError, LayerChangedError, FileAccessError where a layer cannot be read, and
    ValueError for an impossible page size or number of jobs.
    """
    found: list[ExtentList] = []
    compared = 0
    with closing(windows(a, b, page_size, jobs)) as results:
        for result in results:
            found.append(result.ranges)
            compared += result.compared_bytes
            progress(result.compared_bytes)
    ranges = ExtentList(itertools.chain.from_iterable(found))
    first = _first_difference(a, b, ranges, page_size)
    check_unchanged([*a.layers, *b.layers])
    return Comparison(a.size, page_size, first, ranges, compared)


def windows(
    a: MergedView, b: MergedView, page_size: int, jobs: int
) -> Generator[Window, None, None]:
    """The differences of two views, part by part in ascending order; the parts tile the image.

    No page is in two parts. Fingerprints are not compared: call `check_unchanged` when all
    bytes were read. Close the generator. Raises like `compare`.
    """
    comparing = _Comparing(Pair(a, b), page_size)
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"a page of {page_size} bytes, which is not a power of two")
    step = max(_WINDOW, page_size)
    return in_order(comparing.window, split(0, a.size, step), jobs)


def check_unchanged(layers: Iterable[Layer]) -> None:
    """Compare each layer with its fingerprint.

    Raises LayerChangedError, and FileAccessError in place of OSError.
    """
    for layer in dict.fromkeys(layers):
        with failures(layer.path):
            layer.check_unchanged()


class Pair:
    """Two views of one size, side by side. No file is accessed."""

    def __init__(self, a: MergedView, b: MergedView) -> None:
        """Raises SizeMismatchError."""
        require_equal_size(a.layers[0].path, a.size, b.layers[0].path, b.size)
        self.a, self.b = a, b
        files: dict[object, int] = {}
        # A hole has number None in a segment, and so at the end of these lists, [-1].
        self._files_a = [*(files.setdefault(layer.key, len(files)) for layer in a.layers), None]
        self._files_b = [*(files.setdefault(layer.key, len(files)) for layer in b.layers), None]

    def tiles(self, start: int, stop: int) -> Iterator[Tile]:
        """The ranges of `[start, stop)` that must be read to compare the views.

        Skips ranges where both have a hole, or the same range of the same file: by its device,
        inode, size and mtime, even if it was opened twice.
        """
        segments_a = self.a.segments(start, stop - start)
        segments_b = self.b.segments(start, stop - start)
        one, other = next(segments_a), next(segments_b)
        while True:
            end = min(one.stop, other.stop)
            file_a = self._files_a[-1 if one.layer is None else one.layer]
            file_b = self._files_b[-1 if other.layer is None else other.layer]
            if file_a != file_b:
                yield Tile(start, end, one.layer, other.layer)
            if end == stop:
                return
            start = end
            if one.stop == end:
                one = next(segments_a)
            if other.stop == end:
                other = next(segments_b)


def bytes_to_compare(a: MergedView, b: MergedView) -> int:
    """How many bytes of each view `compare` compares."""
    return sum(tile.stop - tile.start for tile in Pair(a, b).tiles(0, a.size))


def require_equal(merged: MergedView, expected: MergedView, path: str, jobs: int = 1) -> None:
    """Raise VerificationError unless `merged` is `expected`, byte for byte.

    `path` is the new file in `merged`, for the message. Also raises what `compare` raises.
    """
    found = compare(merged, expected, jobs=jobs)
    if not found.equal:
        raise VerificationError(
            f"{path}: with this diff byte {found.first} of {found.size} does not read back as the"
            " original's; nothing was written under that name, check the disk and try again"
        )


def count_pages(ranges: ExtentList, page_size: int) -> int:
    """How many pages make up ranges that begin on pages."""
    return sum(-(-(stop - start) // page_size) for start, stop in ranges)


class _Comparing:
    # Compares windows of two views; owns the buffers for that.

    def __init__(self, pair: Pair, page: int) -> None:
        self._pair, self._page, self._size = pair, page, pair.a.size
        self._buffers = (bytearray(_BLOCK), bytearray(_BLOCK))
        self._zeros = bytearray(_BLOCK)

    def window(self, window: tuple[int, int]) -> Window:
        found: list[tuple[int, int]] = []
        compared = 0
        after = 0
        for tile in self._pair.tiles(*window):
            for start, stop in split(tile.start, tile.stop, _BLOCK):
                for offset in self._differing(tile, start, stop):
                    if offset >= after:  # else its page is known
                        first = offset - offset % self._page
                        after = first + self._page
                        found.append((first, min(after, self._size)))
            compared += tile.stop - tile.start
        return Window(ExtentList(found), compared)

    def _differing(self, tile: Tile, start: int, stop: int) -> Iterator[int]:
        length = stop - start
        if length != len(self._zeros):
            self._buffers = (bytearray(length), bytearray(length))
            self._zeros = bytearray(length)
        one = self._filled(0, self._pair.a, tile.a, start)
        other = self._filled(1, self._pair.b, tile.b, start)
        return iter(()) if one == other else _differing(one, other, start, self._page)

    def _filled(self, side: int, view: MergedView, number: int | None, start: int) -> bytearray:
        if number is None:
            return self._zeros
        layer, buffer = view.layers[number], self._buffers[side]
        with failures(layer.path):
            layer.read_into(memoryview(buffer), start)
        return buffer


def _differing(one: bytearray, other: bytearray, offset: int, page: int) -> Iterator[int]:
    # The starts of the pages that differ, or of their parts in the buffers. A bytearray on the left
    # compares by memcmp with any buffer; a memoryview on the left would compare element by element,
    # at a third of the speed.
    right = memoryview(other)
    for start, stop in split(offset, offset + len(one), _PART):
        if one[start - offset : stop - offset] == right[start - offset : stop - offset]:
            continue
        for first, last in split(start, stop, page):
            if one[first - offset : last - offset] != right[first - offset : last - offset]:
                yield first


def _first_difference(a: MergedView, b: MergedView, ranges: ExtentList, page: int) -> int | None:
    if not len(ranges):
        return None
    start, stop = next(iter(ranges))
    for first, last in split(start, stop, min(page, _PART)):
        one, other = (_read(view, first, last) for view in (a, b))
        if one != other:
            pairs = zip(itertools.count(first), one, other, strict=False)
            return next(offset for offset, x, y in pairs if x != y)
    # A layer changed meanwhile: the caller finds that when it compares the fingerprints.
    return start


def _read(view: MergedView, start: int, stop: int) -> bytearray:
    with failures(view.layers[-1].path):
        return view.read(start, stop - start)
