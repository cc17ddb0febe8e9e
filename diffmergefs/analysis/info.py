"""`describe`: the numbers of an image and its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer
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
