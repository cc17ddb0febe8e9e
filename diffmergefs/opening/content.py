"""Comparing a layer's pages with its parents' view, each layer once: results are remembered.

Only the content can tell holes that were filled from zeros that the guest wrote, and a diff without
a hole from a complete image. One comparison serves all checks. The bounds of the checks were chosen
by measurement (docs/contract.md).
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from diffmergefs.core.errors import DenseDiffError, FileAccessError
from diffmergefs.core.extents import MIB, PAGE, ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.core.singleflight import SingleFlight
from diffmergefs.core.view import MergedView
from diffmergefs.sidecars.verified import MAX_REMEMBERED, Identity, Remembered

_GOLDEN = (5**0.5 - 1) / 2

#: Reads the parents' view: takes an offset and a length.
Read = Callable[[int, int], bytearray]

#: What a check found, as numbers of its own; empty if nothing.
Result = tuple[int, ...]

# Of a layer without a hole this many pages are read, or more until enough are over data.
_SAMPLE = 4096
_ENOUGH = 64
_MOST = 16 * _SAMPLE

_FORM = "1"  # of what is remembered: other rules, or other numbers, are another form
_NUMBERS = struct.Struct("=QQQqqQ")


class Pages(NamedTuple):
    """How the pages of a range of a layer compare with its parents' view.

    Where the parents hold data that is not zero, `zero` pages of the layer are zeros, `equal` pages
    are the same and `other` pages differ. `new` pages hold data where the parents have zeros. Zeros
    over zeros are not counted.
    """

    zero: int
    equal: int
    other: int
    new: int

    @property
    def over(self) -> int:
        """The number of pages that lie over non-zero pages of the parents."""
        return self.zero + self.equal + self.other

    @property
    def written(self) -> int:
        """The number of pages that are not zeros."""
        return self.equal + self.other + self.new

    @property
    def mostly_zero(self) -> bool:
        """Whether at least half of `over`, and at least three pages, are zeros."""
        return 3 <= self.zero >= self.over - self.zero


def compare_pages(
    parents: Read | None, layer: Layer, start: int, stop: int, page: int = PAGE
) -> Pages:
    """Compare the pages of `[start, stop)` of a layer's file with its parents' view.

    `stop` is at most the layer's size. Pages are counted from `start` on. Without `parents` every
    page counts as if the parents held other data there. The whole range is read, a MiB or a page at
    a time. Call `Layer.check_unchanged` afterwards (law 6). Raises LayerChangedError and OSError.
    """
    zero = equal = other = new = 0
    zeros = bytes(page)
    part = max(MIB, page)
    for offset in range(start, stop, part):
        ours = bytearray(min(part, stop - offset))
        layer.read_into(memoryview(ours), offset)
        theirs = parents(offset, len(ours)) if parents else None
        for at in range(0, len(ours), page):
            mine = ours[at : at + page]
            below = theirs[at : at + page] if theirs else b""
            blank = zeros[: len(mine)]
            if mine == blank:
                zero += below != blank
            elif below == blank:
                new += 1
            elif mine == below:
                equal += 1
            else:
                other += 1
    return Pages(zero, equal, other, new)


def sum_pages(counts: Iterable[Pages]) -> Pages:
    """The sum of the counts, field by field."""
    return Pages(*map(sum, zip(Pages(0, 0, 0, 0), *counts, strict=True)))


def spread(total: int) -> Iterator[int]:
    """The numbers below `total`, each once, in an order whose every prefix is spread evenly."""
    # Multiples of a step near the golden section of `total` that is coprime to it reach all
    # residues.
    section = max(1, int(total * _GOLDEN))
    step = next(n for n in itertools.count(section) if math.gcd(n, total) == 1)
    return (i * step % total for i in range(total))


class Parents:
    """The open layers below a layer, base first. Add each layer of a chain in turn to go up it."""

    def __init__(self, layers: Iterable[Layer] = ()) -> None:
        self.layers: list[Layer] = []
        self._digest = hashlib.sha256()
        for layer in layers:
            self.add(layer)

    def add(self, layer: Layer) -> None:
        """Add the next newer layer."""
        self.layers.append(layer)
        self._digest.update(_identity(layer))

    def digest(self, layer: Layer, kind: str) -> str:
        """A digest of the content of these layers and of `layer` above them, and of `kind`."""
        digest = self._digest.copy()
        digest.update(_identity(layer) + f"{kind} {_FORM}".encode())
        return digest.hexdigest()


def _identity(layer: Layer) -> bytes:
    # The extents follow from these, except where the page cache decides what is data.
    status, records = layer.status, sorted(layer.records)
    numbers = _NUMBERS.pack(status.st_dev, status.st_ino, *layer.fingerprint)
    if len(layer.unwritten) or len(layer.unmapped):
        numbers += layer.extents.starts.tobytes() + layer.extents.stops.tobytes()
    return numbers + (repr(records).encode() if records else b"")


class Verdicts:
    """The results of content checks, each computed once for a layer over the same parents.

    `memory` keeps them for later runs, keyed by the content of all these layers. With `anew`,
    results of earlier runs are ignored. Safe for several threads: while one thread runs a check,
    the others wait for its result.
    """

    def __init__(self, memory: Remembered, *, anew: bool = False) -> None:
        self._memory = memory
        self._anew = anew
        self._known: dict[str, Result] = {}
        self._guard = threading.Lock()
        self._running: SingleFlight[Result] = SingleFlight()

    def of(self, kind: str, parents: Parents, layer: Layer, run: Callable[[], Result]) -> Result:
        """The result of the check `kind` of `layer` over `parents`; `run` computes an unknown one.

        Blocks while it runs, and raises what it raises.
        """
        chain = parents.digest(layer, kind)

        def recall_or_run() -> Result:
            found = self._recall(kind, chain, layer)
            return self._run(kind, chain, layer, run) if found is None else found

        return self._running.do(chain, recall_or_run)

    def is_known(self, kind: str, parents: Parents, layer: Layer) -> bool:
        """Whether the result is known, so `of` runs nothing."""
        return self._recall(kind, parents.digest(layer, kind), layer) is not None

    def _recall(self, kind: str, chain: str, layer: Layer) -> Result | None:
        with self._guard:
            known = self._known.get(chain)
        if known is not None or self._anew:
            return known
        value = self._memory.recall(kind, Identity.of_open(layer.fd)) or ""
        recorded, *numbers = value.split(" ")
        return self._keep(chain, tuple(map(int, numbers))) if recorded == chain else None

    def _run(self, kind: str, chain: str, layer: Layer, run: Callable[[], Result]) -> Result:
        since_ns, identity = time.time_ns(), Identity.of_open(layer.fd)
        found = run()
        self._memory.remember(kind, identity, " ".join(map(str, (chain, *found))), since_ns)
        return self._keep(chain, found)

    def _keep(self, chain: str, found: Result) -> Result:
        with self._guard:
            if len(self._known) >= MAX_REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[chain] = found
        return found


class ContentCheck(NamedTuple):
    """A check that a layer needs because of its shape; `find` gets the parents' view, if known."""

    kind: str
    find: Callable[[MergedView | None], Result]

    def result(self, parents: Parents | None, layer: Layer, verdicts: Verdicts) -> Result:
        """The result, from `verdicts` if it is known. Blocks; raises DiffMergeError."""

        def find() -> Result:
            try:
                return self.find(MergedView(parents.layers) if parents else None)
            except OSError as error:
                where = error.filename or layer.path
                raise FileAccessError(f"{where}: {error.strerror}") from error

        return verdicts.of(self.kind, parents or Parents(), layer, find)


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
