"""Diffs whose holes were filled with zeros: what is refused, and what is only a hint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from diffmergefs.core import sparse
from diffmergefs.core.errors import UntrustedExtentsError
from diffmergefs.core.extents import MIB, PAGE, Extent, is_aligned
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
from diffmergefs.opening.trust import Problem, Trust, problem_of, require_none

_BUDGET = 8 << 20  # bytes read of the extents of a shape
_PART = 2 << 20  # and of each of many
_BLOCK = 256 << 10
_LARGE = 32
_FEW = 3
_MANY = 8


class Hint(NamedTuple):
    """What may be wrong with the layer `path`, without proof; `str()` is one line."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


def require_exact(
    parents: Parents, layer: Layer, policy: Trust, verdicts: Verdicts
) -> list[Problem]:
    """Raise UntrustedExtentsError if a diff with holes shows a copy-up that filled some (law 4).

    If the policy overrides the check, the result has the problem instead.
    """
    found = copied_up(parents, layer, policy, verdicts)
    return require_none([found] if found else [], policy)


def require_exact_over(below: Read, layer: Layer, policy: Trust) -> list[Problem]:
    """`require_exact` over any bytes. No result is remembered. Raises OSError too."""
    page = max(PAGE, policy.page_size)
    found = find_copy_up(below, layer, page) if _copy_up(layer, policy) else ()
    problem = _copy_up_problem(layer, found, over=" over data of its base")
    return require_none([problem] if problem else [], policy)


def copied_up(
    parents: Parents | None, layer: Layer, policy: Trust, verdicts: Verdicts
) -> Problem | None:
    """The result of `find_copy_up` for a diff on overlayfs that has holes, and no record."""
    check = _copy_up(layer, policy)
    found = check.result(parents, layer, verdicts) if check else ()
    return _copy_up_problem(layer, found, over=" over data of its parent" if parents else "")


def _copy_up_problem(layer: Layer, found: Result, over: str) -> Problem | None:
    if not found:
        return None
    start, stop, zeros = found
    text = (
        f"the extent [{start}, {stop}) on overlayfs has {zeros} pages of zeros{over} beside written"
        " ones, the sign of a copy-up that filled holes"
    )
    return problem_of(layer, "copy-up", text)


def hints(parents: Parents | None, layer: Layer, policy: Trust, verdicts: Verdicts) -> list[Hint]:
    """What may be wrong with a diff that passes all checks: at most one hint.

    If its parents are unknown (None), a sign of a copy-up is only a hint. Raises
    UntrustedExtentsError if the holes look filled and the policy is `strict`.
    """
    if parents is None:
        problem = copied_up(None, layer, policy, verdicts)
        text = "; only the layers below can tell whether it is so"
        return [Hint(layer.path, f"{problem.text}{text}")] if problem else []
    hint = hint_of_filled(parents, layer, policy, verdicts)
    if hint and policy.strict:
        raise UntrustedExtentsError(
            f"{str(hint).partition('; ')[0]}; take the diff again and seal it at once, put the seal"
            " beside it that was made then, or go without --strict: harmless if the guest wiped"
            " or freed them",
            "filled",
        )
    return [hint] if hint else []


def hint_of_filled(
    parents: Parents, layer: Layer, policy: Trust, verdicts: Verdicts
) -> Hint | None:
    """The result of `find_filled` for a diff that has holes, and no record beside it."""
    check = _filled(layer, policy)
    found = check.result(parents, layer, verdicts) if check else ()
    if not found:
        return None
    pages, extents, first = found
    where = f"{extents} aligned extents at {first:#x}..."
    if extents == 1:
        where = f"1 aligned extent at {first:#x}"
    text = (
        f"looks as if holes were filled: {pages} zero pages in {where};"
        " harmless if the guest wiped or freed them"
    )
    return Hint(layer.path, text)


def hole_checks(layer: Layer, policy: Trust) -> list[ContentCheck]:
    """The checks that a diff with holes needs."""
    return [check for check in (_copy_up(layer, policy), _filled(layer, policy)) if check]


def _copy_up(layer: Layer, policy: Trust) -> ContentCheck | None:
    if (
        layer.records
        or layer.extents.covers(layer.size)
        or sparse.filesystem_magic(layer.fd) != sparse.OVERLAYFS_MAGIC
        or not any(may_be_copied_up(*extent, layer.size) for extent in layer.extents)
    ):
        return None
    page = max(PAGE, policy.page_size)

    def find(parents: MergedView | None) -> Result:
        return find_copy_up(parents.read if parents else None, layer, page)

    return ContentCheck(f"copy-up {page}", find)


def _filled(layer: Layer, policy: Trust) -> ContentCheck | None:
    page = max(PAGE, policy.page_size)
    if layer.records or layer.extents.covers(layer.size) or not has_fit(layer, page):
        return None

    def find(parents: MergedView | None) -> Result:
        assert parents is not None
        return find_filled(parents.read, layer, page)

    return ContentCheck(f"filled {page}", find)


def find_copy_up(parents: Read | None, layer: Layer, page: int = PAGE) -> tuple[int, ...]:
    """The first extent that an overlayfs copy-up may have filled: start, stop, zero pages in it.

    The copy starts where the data starts, and extends for a MiB or to the end of the file. Where it
    filled holes, zeros over the parents' data stand beside written pages. All pages of extents of
    that shape are read. If the guest wrote on beside the copy, the pages at whole MiB tell where
    the copy ended. Without `parents`, all zeros count.
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
    """Whether a copy-up can have made an extent, or a part of it, that holds more than before."""
    return stop == size or stop - start >= MIB


class _Compared(NamedTuple):
    # The extent that starts at `start`: all of its pages that were read, and its blocks.
    start: int
    pages: Pages
    blocks: list[Pages]

    def count(self, sign: Callable[[Pages], bool]) -> int:
        return sum(map(sign, self.blocks))


def find_filled(parents: Read, layer: Layer, page: int = PAGE) -> tuple[int, ...]:
    """Extents in which the kernel may have filled holes: how many pages and extents, and the first.

    A store through a shared mapping makes data of the whole cached folio: four pages or more, a
    power of two, naturally aligned. So only extents count that start and end on four pages, and in
    them the blocks that lie as folios do. In a suspicious block some pages over the parents' data
    are zeros and some are not. (A block of zeros only, or over zeros, was wiped and used again.)
    One block suffices if it is large and nearly all zeros. Three blocks suffice if half of each is
    zeros, and eight if any page is. But extents of other shapes may look the same: then as many as
    those three, or a third of those eight, clear them. This is no proof, because guests wipe pages.

    Nothing is read if no extent has that shape. Otherwise at most 16 MiB are read, spread over the
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
    """Whether an extent begins and ends on four pages, or with the file."""
    # If any extent does, usually one of the first does.
    return any(is_aligned(*extent, 4 * page, layer.size) for extent in layer.extents)


def _fits(layer: Layer, page: int) -> tuple[list[Extent], list[Extent]]:
    # The extents that begin and end on four pages, or with the file; and the others.
    sorted_out: tuple[list[Extent], list[Extent]] = [], []
    for extent in layer.extents:
        sorted_out[not is_aligned(*extent, 4 * page, layer.size)].append(extent)
    return sorted_out


def _compare_some(
    parents: Read, layer: Layer, extents: Sequence[Extent], page: int
) -> list[_Compared]:
    found = []
    left, most = _BUDGET, max(_PART, _BUDGET // max(1, len(extents)))
    for number in spread(len(extents)):
        start, stop = extents[number]
        stop = min(stop, start + min(left, most))
        if start >= stop:
            break
        left -= stop - start
        blocks = [compare_pages(parents, layer, *block, page) for block in _blocks(start, stop)]
        found.append(_Compared(start, sum_pages(blocks), blocks))
    return found


def _blocks(start: int, stop: int) -> Iterator[Extent]:
    # The largest blocks that lie as folios do: each a power of two, on a multiple of its size.
    while start < stop:
        size = min(start & -start or _BLOCK, _BLOCK)
        while size > stop - start > PAGE:
            size //= 2
        yield Extent(start, min(start + size, stop))
        start += size
