"""What a diff's pages are over its parents' view: the signs of holes that a copy has filled.

Nothing but the content tells such holes from zeros that the guest wrote. One comparison serves all
checks: which pages of a range of the layer are zeros, or equal, where its parents have other bytes.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from diffmergefs import sparse
from diffmergefs.errors import DenseDiffError
from diffmergefs.extents import ExtentList
from diffmergefs.integrity.state import MAX_REMEMBERED, Identity, Remembered
from diffmergefs.layer import Layer
from diffmergefs.once import Once
from diffmergefs.trust import MIB, PAGE, Problem, TrustPolicy, require_none
from diffmergefs.view import MergedView

_SAMPLE = 4096
_ENOUGH = 64
_MOST = 16 * _SAMPLE
_GOLDEN = (5**0.5 - 1) / 2
_FORM = "1"  # of what is remembered: other rules, or other numbers, are another form

#: What a check has found, in numbers of its own; none if nothing.
Finding = tuple[int, ...]


class Pages(NamedTuple):
    """How many pages of a range of a layer are what, over its parents' view.

    Where the parents have other bytes than zeros: `zero` are zeros, `equal` are the same, `other`
    are neither. `new` are not zeros where the parents have zeros. Zeros over zeros do not count.
    """

    zero: int
    equal: int
    other: int
    new: int

    @property
    def over(self) -> int:
        """How many lie over pages of the parents that are not zeros."""
        return self.zero + self.equal + self.other

    @property
    def written(self) -> int:
        """How many are not zeros."""
        return self.equal + self.other + self.new

    @property
    def looks_filled(self) -> bool:
        """Whether half of those that can tell, and three at least, are zeros, beside written ones.

        So looks what a few writes leave where each has filled a larger unit with zeros.
        """
        return 3 <= self.zero >= self.over - self.zero and self.written > 0


def compare_pages(
    parents: MergedView | None, layer: Layer, start: int, stop: int, page: int = PAGE
) -> Pages:
    """Compare the pages of `[start, stop)` of a layer's file with its parents' view.

    `stop` is at most the layer's size. Pages are counted from `start` on. Without `parents` every
    page counts as one over other bytes. All of the range is read, a MiB or a page at a time. Law 6
    is the caller's to see to (`Layer.settle`). Raises LayerChangedError and OSError.
    """
    zero = equal = other = new = 0
    zeros = bytes(page)
    part = max(MIB, page)
    for offset in range(start, stop, part):
        ours = bytearray(min(part, stop - offset))
        layer.read_into(memoryview(ours), offset)
        theirs = parents.read(offset, len(ours)) if parents else None
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


def sample(parents: MergedView, layer: Layer) -> Pages:
    """Compare pages of a layer with its parents' view that are spread over both's data.

    Up to 4,096 pages are read, and more only until 64 of them are not zeros in the parents: 65,536
    at most. A merged image has most of them equal, a diff whose holes were filled next to none.
    """
    found = Pages(0, 0, 0, 0)
    below = ExtentList((s.start, s.stop) for s in parents.segments() if s.layer is not None)
    for count, offset in enumerate(_spread_pages(below.intersection(layer.extents))):
        if count == _MOST or (count >= _SAMPLE and found.over >= _ENOUGH):
            break
        stop = min(offset + PAGE, layer.size)
        pages = compare_pages(parents, layer, offset, stop)
        found = Pages(*map(sum, zip(found, pages, strict=True)))
    layer.settle()
    return found


def find_copy_up(parents: MergedView | None, layer: Layer, page: int = PAGE) -> Finding:
    """The first extent that a copy-up by overlayfs may have filled: start, stop, zero pages in it.

    The copy begins where the data did, and goes on for a MiB or to the end of the file. Where it
    filled holes, there are zeros over the parents' data beside pages that were written; all pages
    of extents of that shape are read. Without `parents`, all zeros count.
    """
    for start, stop in layer.extents:
        if not _is_like_copy_up(start, stop, layer.size):
            continue
        pages = compare_pages(parents, layer, start, stop, page)
        # A short end of the file is often written to, so a page of zeros there is no sign yet.
        if pages.looks_filled or (stop - start >= MIB and pages.zero and pages.written):
            layer.settle()
            return start, stop, pages.zero
    layer.settle()
    return ()


def _is_like_copy_up(start: int, stop: int, size: int) -> bool:
    return stop == size or (stop - start) % MIB == 0


def _spread_pages(extents: ExtentList) -> Iterator[int]:
    # Offsets of all pages over which there are data, each once, in the order of `_spread`.
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
    for index in _spread(behind[-1] if behind else 0):
        run = bisect.bisect_right(behind, index)
        yield (firsts[run] + index - (behind[run] - counts[run])) * PAGE


def _spread(total: int) -> Iterator[int]:
    # The numbers below `total`, each once, in an order whose every prefix is spread evenly:
    # multiples of a step near the golden section of `total` and coprime to it run through all
    # residues.
    section = max(1, int(total * _GOLDEN))
    step = next(n for n in itertools.count(section) if math.gcd(n, total) == 1)
    return (i * step % total for i in range(total))


class Verdicts:
    """What the checks of content have found, each once for a layer over the same parents.

    It is remembered in `memory` for later runs too, by the content of all these layers; `anew`
    believes nothing of that. Safe for several threads: what one of them looks into is waited for by
    the others.
    """

    def __init__(self, memory: Remembered, *, anew: bool = False) -> None:
        self._memory = memory
        self._anew = anew
        self._known: dict[str, Finding] = {}
        self._guard = threading.Lock()
        self._once: Once[Finding] = Once()

    def of(
        self, kind: str, parents: Sequence[Layer], layer: Layer, look: Callable[[], Finding]
    ) -> Finding:
        """What `look`, the check `kind`, finds in `layer` over `parents`; called if not known.

        It blocks for that, and raises what `look` raises.
        """
        chain = _chain_digest(kind, parents, layer)

        def recall_or_look() -> Finding:
            found = self._recall(kind, chain, layer)
            return self._look(kind, chain, layer, look) if found is None else found

        return self._once.do(chain, recall_or_look)

    def is_known(self, kind: str, parents: Sequence[Layer], layer: Layer) -> bool:
        """Whether `of` would not have to look."""
        return self._recall(kind, _chain_digest(kind, parents, layer), layer) is not None

    def _recall(self, kind: str, chain: str, layer: Layer) -> Finding | None:
        with self._guard:
            known = self._known.get(chain)
        if known is not None or self._anew:
            return known
        value = self._memory.recall(kind, Identity.of_open(layer.fd)) or ""
        recorded, *numbers = value.split(" ")
        return self._keep(chain, tuple(map(int, numbers))) if recorded == chain else None

    def _look(self, kind: str, chain: str, layer: Layer, look: Callable[[], Finding]) -> Finding:
        since_ns, identity = time.time_ns(), Identity.of_open(layer.fd)
        found = look()
        self._memory.remember(kind, identity, " ".join(map(str, (chain, *found))), since_ns)
        return self._keep(chain, found)

    def _keep(self, chain: str, found: Finding) -> Finding:
        with self._guard:
            if len(self._known) >= MAX_REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[chain] = found
        return found


def _chain_digest(kind: str, parents: Sequence[Layer], layer: Layer) -> str:
    digest = hashlib.sha256(f"{kind} {_FORM}".encode())
    for each in (*parents, layer):
        status, records = each.status, sorted(each.records)
        digest.update(repr((status.st_dev, status.st_ino, each.fingerprint, records)).encode())
    return digest.hexdigest()


def require_meant(
    parents: Sequence[Layer], layer: Layer, verdicts: Verdicts, *, in_store: bool
) -> None:
    """Raise DenseDiffError unless a diff without a hole can be taken for a complete image.

    Outside a directory of snapshots only the user can say so. Inside, a sample of its pages must be
    like those of its parents.
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


def sampled(parents: Sequence[Layer], layer: Layer, verdicts: Verdicts) -> Pages:
    """`sample`, unless it was done before."""
    return Pages(*verdicts.of("dense", parents, layer, lambda: sample(MergedView(parents), layer)))


def is_complete(pages: Pages) -> bool:
    """Whether such a sample is one of a complete image, and not of a diff with filled holes."""
    return pages.equal >= pages.zero and pages.equal * 10 >= pages.over


def require_exact(
    parents: Sequence[Layer], layer: Layer, policy: TrustPolicy, verdicts: Verdicts
) -> list[str]:
    """Raise UntrustedExtentsError if a diff with holes shows a copy-up that filled some (law 4).

    With the policy's word for it the answer has a line instead.
    """
    found = copied_up(parents, layer, policy, verdicts)
    return require_none([found] if found else [], policy)


def hints_of_copy_up(layer: Layer, policy: TrustPolicy, verdicts: Verdicts) -> list[str]:
    """A line if a diff looks copied up, as far as can be told without the layers below it."""
    found = copied_up(None, layer, policy, verdicts)
    return [f"{found}; only the layers below can tell whether it is so"] if found else []


def copied_up(
    parents: Sequence[Layer] | None, layer: Layer, policy: TrustPolicy, verdicts: Verdicts
) -> Problem | None:
    """What `find_copy_up` finds in a diff with holes on overlayfs; one with a record has none."""
    if layer.records or layer.extents.covers(layer.size) or not _may_be_copied_up(layer):
        return None
    page = max(PAGE, policy.page_size)
    view = None if parents is None else MergedView(parents)
    found = verdicts.of(
        f"copy-up {page} {parents is None}",
        parents or (),
        layer,
        lambda: find_copy_up(view, layer, page),
    )
    if not found:
        return None
    start, stop, zeros = found
    text = (
        f"the extent [{start}, {stop}) on overlayfs has {zeros} pages of zeros"
        f"{' over data of its parent' if parents else ''} beside written ones, the sign of a"
        " copy-up that filled holes"
    )
    return Problem(layer.path, "copy-up", text, _WAY_OUT)


_WAY_OUT = (
    "put its seal beside it if it has one, take the diff again, or vouch for it with"
    " --trust-grain=copy-up (wrong bytes if it is not so)"
)


def _may_be_copied_up(layer: Layer) -> bool:
    return sparse.filesystem_magic(layer.fd) == sparse.OVERLAYFS_MAGIC and any(
        _is_like_copy_up(start, stop, layer.size) for start, stop in layer.extents
    )
