"""What a diff's pages are over its parents' view: the signs of holes that were filled.

Nothing but the content tells such holes from zeros that the guest wrote. One comparison serves all
signs: which pages of a range of the layer are zeros, or equal, where its parents have other bytes.
Bounds are chosen by measurement (docs/contract.md).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from diffmergefs.core.extents import Extent, ExtentList
from diffmergefs.core.layer import Layer

PAGE = 4096
MIB = 1 << 20
_SAMPLE = 4096
_ENOUGH = 64
_MOST = 16 * _SAMPLE
_BUDGET = 8 << 20  # bytes read of the extents of a shape
_PART = 2 << 20  # and of each of many
_BLOCK = 256 << 10
_LARGE = 32
_FEW = 3
_MANY = 8
_GOLDEN = (5**0.5 - 1) / 2

#: Gives the bytes of the parents' view from an offset on, so many.
Read = Callable[[int, int], bytearray]


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
    def mostly_zero(self) -> bool:
        """Whether half of those over other bytes than zeros, and three at least, are zeros."""
        return 3 <= self.zero >= self.over - self.zero


def compare_pages(
    parents: Read | None, layer: Layer, start: int, stop: int, page: int = PAGE
) -> Pages:
    """Compare the pages of `[start, stop)` of a layer's file with its parents' view.

    `stop` is at most the layer's size. Pages are counted from `start` on. Without `parents` every
    page counts as one over other bytes. All of the range is read, a MiB or a page at a time. Law 6
    is the caller's to see to (`Layer.check_unchanged`). Raises LayerChangedError and OSError.
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


def sample(parents: Read, below: ExtentList, layer: Layer) -> Pages:
    """Compare pages of a layer with its parents' view that are spread over the data of both.

    `below` is where the parents have data.

    Up to 4,096 pages are read, and more only until 64 of them are not zeros in the parents: 65,536
    at most. A merged image has most of them equal, a diff whose holes were filled next to none.
    """
    found = Pages(0, 0, 0, 0)
    for count, offset in enumerate(_spread_pages(below.intersection(layer.extents))):
        if count == _MOST or (count >= _SAMPLE and found.over >= _ENOUGH):
            break
        stop = min(offset + PAGE, layer.size)
        pages = compare_pages(parents, layer, offset, stop)
        found = _sum((found, pages))
    layer.check_unchanged()
    return found


def find_copy_up(parents: Read | None, layer: Layer, page: int = PAGE) -> tuple[int, ...]:
    """The first extent that a copy-up by overlayfs may have filled: start, stop, zero pages in it.

    The copy begins where the data did, and goes on for a MiB or to the end of the file. Where it
    filled holes, there are zeros over the parents' data beside pages that were written; all pages
    of extents of that shape are read. Of one that was written on beside the copy, the pages at
    whole MiB tell where the copy ended. Without `parents`, all zeros count.
    """
    for start, stop in layer.extents:
        if stop != layer.size and (stop - start) % MIB:
            stop = _end_of_copy(parents, layer, start, stop, page) or start
        pages = compare_pages(parents, layer, start, stop, page)
        # A short end of the file is often written to, so a page of zeros there is no sign yet.
        if pages.written and (pages.mostly_zero or (pages.zero and stop - start >= MIB)):
            layer.check_unchanged()
            return start, stop, pages.zero
    layer.check_unchanged()
    return ()


def _end_of_copy(parents: Read | None, layer: Layer, start: int, stop: int, page: int) -> int:
    # Where zeros over the parents' data end at a whole MiB after a written page; 0 if nowhere.
    def at(offset: int) -> Pages:
        return compare_pages(parents, layer, offset, min(offset + page, stop), page)

    for end in range(start + MIB, stop, MIB):
        if page <= MIB and at(end - page).zero and at(end).written and at(start).written:
            return end
    return 0


def may_be_copied_up(start: int, stop: int, size: int) -> bool:
    """Whether a copy-up can have made an extent, or a part of it, that has more than was there."""
    return stop == size or stop - start >= MIB


class _Compared(NamedTuple):
    # An extent from `start` on: all pages that were read of it, and its blocks.
    start: int
    pages: Pages
    blocks: list[Pages]

    def count(self, sign: Callable[[Pages], bool]) -> int:
        return sum(map(sign, self.blocks))


def find_filled(parents: Read, layer: Layer, page: int = PAGE) -> tuple[int, ...]:
    """Extents in which the kernel may have filled holes: how many pages and extents, the first one.

    A store through a shared mapping makes data of the whole folio that is cached there: of four
    pages or more, a power of two, in its place. So only extents that begin and end on four pages
    count, and in them the blocks that lie as folios do, where some of the pages over the parents'
    data are zeros and some are not: what is all zeros, or lies over zeros, was wiped and used
    again. One block is enough if it is large and nearly all zeros. Three are if half of each is
    zeros, and eight if any are: unless extents of other shapes look so too, as many as those three,
    or a third of those eight. None of it is proof, for guests wipe pages.

    Without an extent of that shape nothing is read, and else 16 MiB at most, spread over the
    extents.
    """
    fit, others = _fits(layer, page)
    found = _compare_some(parents, layer, fit, page)
    suspects = sum(each.count(_is_suspect) for each in found)
    mixed = sum(each.count(_is_mixed) for each in found)
    sign: Callable[[Pages], bool] | None = None
    if any(each.count(_is_plain) for each in found):
        sign = _is_suspect
    elif suspects >= _FEW or mixed >= _MANY:
        beside = [each.pages for each in _compare_some(parents, layer, others, page)]
        # Of both only a part was read.
        more = len(others) * len(found) / (len(fit) * max(1, len(beside)))
        if suspects >= _FEW and suspects > more * sum(map(_is_suspect, beside)):
            sign = _is_suspect
        elif mixed >= _MANY and mixed >= 3 * more * sum(map(_is_mixed, beside)):
            sign = _is_mixed
    layer.check_unchanged()
    named = [each for each in found if sign and each.count(sign)]
    if not named:
        return ()
    return sum(each.pages.zero for each in named), len(named), min(named).start


def _is_mixed(pages: Pages) -> bool:
    return pages.zero > 0 and pages.equal + pages.other > 0


def _is_suspect(pages: Pages) -> bool:
    return _is_mixed(pages) and pages.mostly_zero


def _is_plain(pages: Pages) -> bool:
    return _is_mixed(pages) and _LARGE <= pages.over <= pages.zero * 16 // 15


def has_fit(layer: Layer, page: int) -> bool:
    """Whether an extent begins and ends on four pages, or with the file. Mostly one of the first
    does, if any.
    """
    unit, size = 4 * page, layer.size
    borders = zip(layer.extents.starts, layer.extents.stops, strict=True)
    return any(not start % unit and (not stop % unit or stop == size) for start, stop in borders)


def _fits(layer: Layer, page: int) -> tuple[list[Extent], list[Extent]]:
    # The extents that do, and the others.
    unit = 4 * page
    sorted_out: tuple[list[Extent], list[Extent]] = [], []
    for start, stop in zip(layer.extents.starts, layer.extents.stops, strict=True):
        is_other = start % unit or (stop % unit and stop != layer.size)
        sorted_out[bool(is_other)].append(Extent(start, stop))
    return sorted_out


def _compare_some(
    parents: Read, layer: Layer, extents: Sequence[Extent], page: int
) -> list[_Compared]:
    found = []
    left, most = _BUDGET, max(_PART, _BUDGET // max(1, len(extents)))
    for number in _spread(len(extents)):
        start, stop = extents[number]
        stop = min(stop, start + min(left, most))
        if start >= stop:
            break
        left -= stop - start
        blocks = [compare_pages(parents, layer, *block, page) for block in _blocks(start, stop)]
        found.append(_Compared(start, _sum(blocks), blocks))
    return found


def _blocks(start: int, stop: int) -> Iterator[Extent]:
    # The largest ones that lie as folios do: each a power of two, on a multiple of its size.
    while start < stop:
        size = min(start & -start or _BLOCK, _BLOCK)
        while size > stop - start > PAGE:
            size //= 2
        yield Extent(start, min(start + size, stop))
        start += size


def _sum(counts: Iterable[Pages]) -> Pages:
    return Pages(*map(sum, zip(Pages(0, 0, 0, 0), *counts, strict=True)))


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
