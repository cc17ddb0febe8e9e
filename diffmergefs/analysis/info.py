"""What an image consists of: the numbers of its layers, and the entries of its map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from diffmergefs.core.extents import ExtentList, split
from diffmergefs.core.failures import failures
from diffmergefs.core.layer import Layer
from diffmergefs.core.sparse import BLOCK
from diffmergefs.core.view import MergedView
from diffmergefs.core.workers import Progress
from diffmergefs.opening.filesystems import is_filled_by_readers
from diffmergefs.opening.images import Image
from diffmergefs.opening.trust import Problem, grain
from diffmergefs.sidecars.bmap import SEAL_SUFFIX


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a chain; numbers are bytes, except `extents`, the count of data extents.

    `visible_bytes` of its `data_bytes` are visible in the view, `shadowed_bytes` are hidden by
    newer layers. `grain` is the unit in which its filesystem reports holes, or its record's.
    `trust` is 'sealed' where its extents are a seal's, 'recorded' where they are a presence file's,
    else 'base' or 'trusted', or 'overridden: ' and the checks of law 4 that failed and were
    overridden.
    """

    path: str
    data_bytes: int
    extents: int
    visible_bytes: int
    shadowed_bytes: int
    grain: int
    trust: str


@dataclass(frozen=True)
class ChainInfo:
    """An image: `size` bytes, of which `holes` are in no layer, and its layers, base first.

    `segments` counts the ranges that one layer supplies, without holes. `dense`: the
    newest layer is a complete image in spite of its parent. `hints` are lines about layers that may
    be damaged, without proof.
    """

    size: int
    layers: tuple[LayerInfo, ...]
    holes: int
    segments: int
    dense: bool
    hints: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As nested dictionaries and lists, ready for JSON."""
        layers = [asdict(layer) for layer in self.layers]
        return {**asdict(self), "layers": layers, "hints": list(self.hints)}


def describe(image: Image) -> ChainInfo:
    """The facts of an open image. Reads metadata only; the image stays open.

    The numbers are those of the layers as they were opened. Raises OSError as fstat does.
    """
    view = image.view
    visible = view.visible_bytes()
    layers = [
        LayerInfo(
            path=layer.path,
            data_bytes=layer.extents.data_bytes,
            extents=len(layer.extents),
            visible_bytes=own_bytes,
            shadowed_bytes=layer.extents.data_bytes - own_bytes,
            grain=layer.records[0].block if layer.records else grain(layer.fd),
            trust=_trust(layer, image.problems, is_base=number == 0),
        )
        for number, (layer, own_bytes) in enumerate(zip(view.layers, visible, strict=True))
    ]
    segments = sum(segment.layer is not None for segment in view.segments())
    hints = tuple(map(str, image.hints))
    holes = view.size - sum(visible)
    return ChainInfo(view.size, tuple(layers), holes, segments, image.dense, hints)


def notices(image: Image) -> list[str]:
    """What may damage the image's diffs where they are: a line for each filesystem.

    Diffs that a seal or another record protects are not mentioned. Raises OSError as fstat and
    fstatfs do.
    """
    found: dict[int, str] = {}
    for layer in image.view.layers[1:]:
        has_holes = not layer.extents.covers(layer.size)
        if has_holes and not layer.records and is_filled_by_readers(layer.fd):
            found.setdefault(layer.status.st_dev, layer.path)
    return [
        f"{path}: a diff without a seal on tmpfs: a process that maps it and reads a hole makes the"
        f" hole zeros of the diff; diffmergefs seal {path} protects it"
        for path in found.values()
    ]


def run_lengths(extents: ExtentList, page: int) -> list[int]:
    """A histogram of the extents' lengths, in pages of `page` bytes, by powers of two.

    Item `n` counts those of `2**n` up to, but not including, `2**(n+1)` pages; an extent shorter
    than a page counts as one page. The last item is not 0; without extents the list is empty.
    """
    counts: list[int] = []
    for start, stop in zip(extents.starts, extents.stops, strict=True):
        power = max((stop - start) // page, 1).bit_length() - 1
        counts.extend([0] * (power + 1 - len(counts)))
        counts[power] += 1
    return counts


def _trust(layer: Layer, problems: Sequence[Problem], *, is_base: bool) -> str:
    checks = [problem.check for problem in problems if problem.path == layer.path]
    # A layer that is in a chain twice has its problems twice.
    if checks and not is_base:
        return f"overridden: {', '.join(dict.fromkeys(checks))}"
    if layer.records:
        return "sealed" if layer.records[0].suffix == SEAL_SUFFIX else "recorded"
    return "base" if is_base else "trusted"


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
