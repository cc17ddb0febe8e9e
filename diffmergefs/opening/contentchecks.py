"""The checks of a diff's content over its parents: what is refused, and what is only a hint."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from diffmergefs.core import sparse
from diffmergefs.core.errors import DenseDiffError, FileAccessError, UntrustedExtentsError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.opening import content
from diffmergefs.opening.content import Pages
from diffmergefs.opening.contentverdicts import Finding, Parents, Verdicts
from diffmergefs.opening.trust import PAGE, Problem, TrustPolicy, require_none

_WAY_OUT = (
    "put its seal beside it if it has one, take the diff again, or vouch for it with"
    " --trust-grain=copy-up (wrong bytes if it is not so)"
)


class Hint(NamedTuple):
    """What may be wrong with the layer `path`, though nothing proves it; `str()` is one line."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


class _Look(NamedTuple):
    # A look that a layer needs by its shape; it is given the parents' view, if they are known.
    kind: str
    find: Callable[[MergedView | None], Finding]

    def found(self, parents: Parents | None, layer: Layer, verdicts: Verdicts) -> Finding:
        def find() -> Finding:
            try:
                return self.find(MergedView(parents.layers) if parents else None)
            except OSError as error:
                where = error.filename or layer.path
                raise FileAccessError(f"{where}: {error.strerror}") from error

        return verdicts.of(self.kind, parents or Parents(), layer, find)


def require_meant(parents: Parents, layer: Layer, verdicts: Verdicts, *, in_store: bool) -> None:
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


def sampled(parents: Parents, layer: Layer, verdicts: Verdicts) -> Pages:
    """`content.sample`, unless it was done before."""
    return Pages(*_sample(layer).found(parents, layer, verdicts))


def is_complete(pages: Pages) -> bool:
    """Whether such a sample is one of a complete image, and not of a diff with filled holes."""
    return pages.equal >= pages.zero and pages.equal * 10 >= pages.over


def require_exact(
    parents: Parents, layer: Layer, policy: TrustPolicy, verdicts: Verdicts
) -> list[str]:
    """Raise UntrustedExtentsError if a diff with holes shows a copy-up that filled some (law 4).

    With the policy's word for it the answer has a line instead.
    """
    found = copied_up(parents, layer, policy, verdicts)
    return require_none([found] if found else [], policy)


def require_exact_over(below: content.Read, layer: Layer, policy: TrustPolicy) -> list[str]:
    """`require_exact` over any bytes, of which nothing is remembered. Raises OSError too."""
    page = max(PAGE, policy.page_size)
    found = content.find_copy_up(below, layer, page) if _copy_up(layer, policy) else ()
    problem = _copy_up_problem(layer, found, over=" over data of its base")
    return require_none([problem] if problem else [], policy)


def copied_up(
    parents: Parents | None, layer: Layer, policy: TrustPolicy, verdicts: Verdicts
) -> Problem | None:
    """What `content.find_copy_up` finds in a diff on overlayfs that has holes, and no record."""
    look = _copy_up(layer, policy)
    found = look.found(parents, layer, verdicts) if look else ()
    return _copy_up_problem(layer, found, over=" over data of its parent" if parents else "")


def _copy_up_problem(layer: Layer, found: Finding, over: str) -> Problem | None:
    if not found:
        return None
    start, stop, zeros = found
    text = (
        f"the extent [{start}, {stop}) on overlayfs has {zeros} pages of zeros{over} beside written"
        " ones, the sign of a copy-up that filled holes"
    )
    return Problem(layer.path, "copy-up", text, _WAY_OUT)


def hints(
    parents: Parents | None, layer: Layer, policy: TrustPolicy, verdicts: Verdicts
) -> list[Hint]:
    """What may be wrong with a diff that passes all checks: a hint at most.

    Where its parents are not known (None), a copy-up is no more than that. Raises
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
    parents: Parents, layer: Layer, policy: TrustPolicy, verdicts: Verdicts
) -> Hint | None:
    """What `content.find_filled` finds in a diff that has holes, and no record beside it."""
    look = _filled(layer, policy)
    found = look.found(parents, layer, verdicts) if look else ()
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


def must_read(parents: Parents, layer: Layer, policy: TrustPolicy, verdicts: Verdicts) -> bool:
    """Whether the checks of a link of a directory of snapshots have to read pages."""
    looks = _looks(layer, policy)
    return any(not verdicts.is_known(look.kind, parents, layer) for look in looks)


def read(parents: Parents, layer: Layer, policy: TrustPolicy, verdicts: Verdicts) -> None:
    """Have in `verdicts` what these checks need. Blocks; raises DiffMergeError."""
    for look in _looks(layer, policy):
        look.found(parents, layer, verdicts)


def _looks(layer: Layer, policy: TrustPolicy) -> list[_Look]:
    if layer.extents.covers(layer.size):
        return [] if policy.dense else [_sample(layer)]
    return [look for look in (_copy_up(layer, policy), _filled(layer, policy)) if look]


def _sample(layer: Layer) -> _Look:
    def find(parents: MergedView | None) -> Finding:
        assert parents is not None
        below = ((s.start, s.stop) for s in parents.segments() if s.layer is not None)
        return content.sample(parents.read, ExtentList(below), layer)

    return _Look("dense", find)


def _copy_up(layer: Layer, policy: TrustPolicy) -> _Look | None:
    if (
        layer.records
        or layer.extents.covers(layer.size)
        or sparse.filesystem_magic(layer.fd) != sparse.OVERLAYFS_MAGIC
        or not any(content.may_be_copied_up(*extent, layer.size) for extent in layer.extents)
    ):
        return None
    page = max(PAGE, policy.page_size)

    def find(parents: MergedView | None) -> Finding:
        return content.find_copy_up(parents.read if parents else None, layer, page)

    return _Look(f"copy-up {page}", find)


def _filled(layer: Layer, policy: TrustPolicy) -> _Look | None:
    page = max(PAGE, policy.page_size)
    if layer.records or layer.extents.covers(layer.size) or not content.has_fit(layer, page):
        return None

    def find(parents: MergedView | None) -> Finding:
        assert parents is not None
        return content.find_filled(parents.read, layer, page)

    return _Look(f"filled {page}", find)
