"""`rediff` and `squash`: new diffs, made from complete images or from other diffs."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass

from diffmergefs.analysis.compare import count_pages, require_equal, windows
from diffmergefs.core.errors import counted
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.core.workers import Progress, ignore_progress
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.newdiff import NewDiff, WrittenDiff


@dataclass(frozen=True)
class RediffResult:
    """What `rediff` wrote.

    `changed_pages` of `page_size` bytes differ between parent and child, and are the data of the
    `written` diff. `compared_bytes` of each image had to be compared.
    """

    page_size: int
    changed_pages: int
    compared_bytes: int
    written: WrittenDiff

    @property
    def ratio(self) -> float:
        """The diff's data as a fraction of the image, 0 to 1."""
        return self.written.data_bytes / self.written.size


def rediff(
    parent: MergedView,
    child: MergedView,
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    verify: bool = False,
    seal: bool = False,
    jobs: int = 1,
    policy: TrustPolicy | None = None,
    progress: Progress = ignore_progress,
) -> RediffResult:
    """Write the diff that turns `parent` into `child`: the pages that differ, and holes elsewhere.

    Pages have `policy.page_size`. A page that became zero is written as zeros, and before the file
    gets its name it is proven to be data (see `newdiff.NewDiff`, also for `force`, `seal` and the
    mode). The diff over `parent` gives `child`, byte for byte; `verify` compares all of it first.
    Both must have one size. This reads what `compare` reads, and the changed pages. `jobs`
    processes share the comparison. `progress` is given `compare.bytes_to_compare` in all. No input
    is written; each of their layers is compared with its fingerprint at the end (law 6). Blocks.

    Raises SizeMismatchError, OutputRefusedError (the output exists without `force`, or is a layer
    of either), UntrustedExtentsError (no diff can be trusted where the output is), NoSpaceError,
    VerificationError, LayerChangedError, and FileAccessError for every other failure of a file.
    """
    policy = policy or TrustPolicy()
    page = policy.page_size
    changed = compared = 0
    results = windows(parent, child, page, jobs)
    with (
        closing(results),
        NewDiff(output, child, parent.layers, policy=policy, force=force) as diff,
    ):
        for window in results:
            diff.put(window.ranges)
            changed += count_pages(window.ranges, page)
            compared += window.compared_bytes
            progress(window.compared_bytes)

        def check(layer: Layer) -> None:
            if verify:
                merged = MergedView([*parent.layers, layer])
                require_equal(merged, child, layer.path, jobs)

        written = diff.publish(seal=seal, check=check)
    return RediffResult(page, changed, compared, written)


@dataclass(frozen=True)
class SquashResult:
    """What `squash` wrote: the diffs `first` to `last` of a chain (0 is the base) as one.

    `shadowed_bytes` of their data were hidden by newer ones among them, and were left out.
    """

    first: int
    last: int
    shadowed_bytes: int
    written: WrittenDiff


def squash(
    view: MergedView,
    output: str | os.PathLike[str],
    *,
    first: int = 1,
    last: int | None = None,
    force: bool = False,
    verify: bool = False,
    seal: bool = False,
    policy: TrustPolicy | None = None,
    progress: Progress = ignore_progress,
) -> SquashResult:
    """Write the diffs `first` to `last` of the view's chain, both included, as one diff.

    These are layer numbers, by default all diffs; 0 is the base, which is not read. In their place
    the new diff gives the same image, byte for byte; `verify` compares that before the file gets
    its name. The new diff has data where one of them has, including zeros, and holes elsewhere,
    which is proven (see `newdiff.NewDiff`, also for `force`, `seal`, the mode and what is raised).
    `progress` is given `count_data` bytes in all. Raises ValueError for numbers that are not those
    of diffs, or not in this order.
    """
    last = len(view.layers) - 1 if last is None else last
    if not 1 <= first <= last < len(view.layers):
        layers = counted(len(view.layers), "layer")
        raise ValueError(f"diffs {first} to {last} of a chain of {layers}, of which 0 is the base")
    diffs = MergedView(view.layers[first : last + 1])
    extents = diffs.data_extents()

    def check(layer: Layer) -> None:
        if verify:
            chain = [*view.layers[:first], layer, *view.layers[last + 1 :]]
            require_equal(MergedView(chain), view, layer.path)

    # The output may replace no layer of the whole chain, not even one that is not squashed.
    with NewDiff(output, diffs, view.layers, policy=policy, force=force) as diff:
        diff.put(extents, progress)
        written = diff.publish(seal=seal, check=check)
    held = sum(layer.extents.data_bytes for layer in diffs.layers)
    return SquashResult(first, last, held - written.data_bytes, written)


def count_data(view: MergedView, first: int, last: int) -> int:
    """How many bytes of data the diffs `first` to `last` have when merged."""
    return MergedView(view.layers[first : last + 1]).data_extents().data_bytes
