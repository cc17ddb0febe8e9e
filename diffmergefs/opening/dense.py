"""Diffs without a hole: a complete image, or a diff whose holes were filled?"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator

from diffmergefs.core.errors import DenseDiffError
from diffmergefs.core.extents import PAGE, ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.opening.content import (
    ContentCheck,
    Pages,
    Parents,
    Read,
    Result,
    Verdicts,
    compare_pages,
    spread,
    sum_pages,
)

_SAMPLE = 4096
_ENOUGH = 64
_MOST = 16 * _SAMPLE


def require_meant(parents: Parents, layer: Layer, verdicts: Verdicts, *, in_store: bool) -> None:
    """Raise DenseDiffError unless a diff without a hole is a complete image.

    For explicit layers only the user can know that. In a store, a sample of its pages must resemble
    those of its parents.
    """
    if not in_store:
        raise DenseDiffError(
            f"{layer.path}: a diff without a hole in {layer.size} bytes: it would hide all layers"
            " below; if it is a complete image, say so with --dense"
        )
    pages = sampled(parents, layer, verdicts)
    if not is_complete(pages):
        raise DenseDiffError(
            f"{layer.path}: looks like a diff whose holes were filled: of {pages.over} pages that"
            f" are not zero in its parent {pages.zero} are zero in it and {pages.equal} equal; put"
            " its seal beside it, take the diff again, or say with --dense that it is a complete"
            " image"
        )


def sampled(parents: Parents, layer: Layer, verdicts: Verdicts) -> Pages:
    """The result of `sample`, which is taken only if it is unknown."""
    return Pages(*sample_check(layer).result(parents, layer, verdicts))


def is_complete(pages: Pages) -> bool:
    """Whether a sample shows a complete image and not a diff whose holes were filled."""
    return pages.equal >= pages.zero and pages.equal * 10 >= pages.over


def sample_check(layer: Layer) -> ContentCheck:
    """The check that samples a layer without a hole."""

    def find(parents: MergedView | None) -> Result:
        assert parents is not None
        return sample(parents.read, parents.data_extents(), layer)

    return ContentCheck("dense", find)


def sample(parents: Read, below: ExtentList, layer: Layer) -> Pages:
    """Compare pages of a layer with its parents' view, spread over the data of both.

    `below` is where the parents have data. Reads 4,096 pages, and then more until 64 pages are not
    zeros in the parents, but at most 65,536. In a merged image most of them are equal, in a diff
    whose holes were filled almost none.
    """
    found = Pages(0, 0, 0, 0)
    for count, offset in enumerate(_spread_pages(below.intersection(layer.extents))):
        if count == _MOST or (count >= _SAMPLE and found.over >= _ENOUGH):
            break
        stop = min(offset + PAGE, layer.size)
        pages = compare_pages(parents, layer, offset, stop)
        found = sum_pages((found, pages))
    layer.check_unchanged()
    return found


def _spread_pages(extents: ExtentList) -> Iterator[int]:
    # The offsets of all pages that hold data, each once, in the order of `spread`.
    firsts: list[int] = []
    counts: list[int] = []
    end = 0  # neighbouring extents may share a page, if the base's grain is smaller
    for start, stop in extents:
        first = max(start // PAGE, end)
        if first * PAGE < stop:
            end = -(-stop // PAGE)
            firsts.append(first)
            counts.append(end - first)
    behind = list(itertools.accumulate(counts))
    for index in spread(behind[-1] if behind else 0):
        run = bisect.bisect_right(behind, index)
        yield (firsts[run] + index - (behind[run] - counts[run])) * PAGE
