"""Opening images: from an IMAGE, a snapshot of a catalog, or explicit layers, to a view."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from diffmergefs.core.errors import BrokenChainError, DiffMergeError, UntrustedExtentsError
from diffmergefs.core.failures import failures
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView, require_equal_size
from diffmergefs.opening.content import ContentCheck, Parents, Verdicts, require_meant, sample_check
from diffmergefs.opening.filled import Hint, hints, hole_checks, require_exact
from diffmergefs.opening.opener import LayerPool, Opener, opened_store
from diffmergefs.opening.pins import Hashes, require_pin
from diffmergefs.opening.trust import (
    Problem,
    RecordOptions,
    Trust,
    TrustPolicy,
    override_lines,
    require_trust,
)
from diffmergefs.opening.writers import require_no_writers
from diffmergefs.sidecars.verified import Remembered
from diffmergefs.stores.lookup import find_image, is_image, require_mergeable
from diffmergefs.stores.snapshot import Snapshot

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Image:
    """An open image: its view, and what the checks of its layers found.

    `tags` are those of its layers, base first, if they lie in a directory of snapshots. `dense`
    says that the newest layer is a complete image although it has a parent; `overridden` has
    a line for each check that failed and that the policy overrode: those of law 4, which are in
    `problems` too, and whether someone has a layer open for writing. `hints` are about layers that
    may be damaged although nothing proves it, at most one for each layer.
    """

    view: MergedView
    dense: bool = False
    overridden: list[str] = field(default_factory=list)
    tags: tuple[str, ...] = ()
    hints: tuple[Hint, ...] = ()
    problems: tuple[Problem, ...] = ()


def open_chain(
    base: str | os.PathLike[str],
    diffs: Sequence[str | os.PathLike[str]] = (),
    policy: TrustPolicy | None = None,
) -> Image:
    """Open explicit layers, oldest first, as one image.

    The files must exist and have the same size. They are synced and walked, never written. A layer
    with a seal beside it has the seal's extents, and a diff with a presence file has the presence
    file's; both are compared with the layer's bytes first (`Opener`). The diffs must pass law 4,
    and a diff without a hole is refused unless `policy.dense`. A layer that someone has open for
    writing is refused unless `policy.allow_writers`, as far as that is known (`opening.writers`). A
    file that is given twice, also by a hard link, is refused. An order that looks wrong
    (`warn_of_order`) is logged as a warning. Raises DiffMergeError (see `diffmergefs.core.errors`).
    """
    policy = policy or TrustPolicy()
    require_mergeable(os.fspath(base), [os.fspath(diff) for diff in diffs])
    opener = Opener(policy)
    layers = [opener.open(os.fspath(base))]
    layers += [opener.open(os.fspath(path), is_diff=True) for path in diffs]
    require_distinct(layers)
    verdicts = Verdicts(Remembered(policy.state_dir), anew=policy.anew)
    image = _judge(layers, policy, verdicts, in_store=False)
    warn_of_order(image.view)
    return image


def open_image(path: str | os.PathLike[str], policy: TrustPolicy | None = None) -> Image:
    """Open a snapshot directory or a numbered layer file as one image.

    Its parents are found beside it. Its layers have absolute paths. A diff without a hole counts as
    complete only if a check against its parents supports that, or with `policy.dense`. A layer that
    someone has open for writing is refused as by `open_chain`. A parent whose content is not what
    its child records (`parent_content_hash`) is refused, unless `policy.verify` is 'no'. That check
    reads the whole file once ('pins') or each time ('full'). Raises DiffMergeError.
    """
    policy = policy or TrustPolicy()
    catalog, tag = find_image(path, policy)
    try:
        links = catalog.chain(tag)
    except DiffMergeError as error:
        raise type(error)(f"in {catalog.root}: {error}") from None
    with opened_store(catalog.root, policy) as pool:
        image = open_snapshot(links, pool, policy)
    if policy.compares:
        _require_pins(image.view.layers, links, policy)
    return image


def open_side(
    path: str | os.PathLike[str],
    diffs: Sequence[str | os.PathLike[str]] = (),
    policy: TrustPolicy | None = None,
    *,
    plain: bool = False,
) -> Image:
    """Open an IMAGE, or any other file as a complete image: its holes are zeros.

    A snapshot directory and a numbered layer are opened by `open_image`. Any other file is opened
    as a base by `open_chain`, and so is every file with `plain` or with `diffs` over it, oldest
    first. A diff that is given as an image cannot be recognised. Raises DiffMergeError.
    """
    if diffs or plain or not is_image(path):
        return open_chain(path, diffs, policy)
    return open_image(path, policy)


def _require_pins(
    layers: Sequence[Layer], links: Sequence[Snapshot], policy: RecordOptions
) -> None:
    hashes = Hashes(Remembered(policy.state_dir), anew=policy.anew)
    for parent, link in zip(layers, links[1:], strict=False):
        with failures(parent.path):
            require_pin(parent, link, hashes)


def open_snapshot(
    links: Sequence[Snapshot],
    pool: LayerPool,
    policy: TrustPolicy,
) -> Image:
    """Open the chain `links`, base first, of a directory of snapshots.

    Recorded hashes of parents are not compared. Raises DiffMergeError.
    """
    layers = [pool.layer(link.layer) for link in links]
    image = _judge(layers, policy, pool.verdicts, in_store=True)
    problems = require_known_base(layers[0], links[0].doubt, policy)
    overridden = [*image.overridden, *override_lines(problems)]
    tags = tuple(link.tag for link in links)
    return replace(image, overridden=overridden, tags=tags, problems=(*image.problems, *problems))


def require_known_base(layer: Layer, doubt: str | None, policy: Trust) -> list[Problem]:
    """Raise DiffMergeError if a base with a `Snapshot.doubt` has a hole, or may have one.

    A sidecar tells where its holes are; without one, law 4 tells whether they are known here.
    Returns the checks that the policy overrides.
    """
    if doubt is None:
        return []
    if not layer.extents.covers(layer.size):
        raise BrokenChainError(f"{layer.path}: has holes, and {doubt}")
    try:
        return require_trust(layer, policy, complete=True)
    except UntrustedExtentsError as error:
        reason = f"{layer.path}: may have holes, and {doubt} (here it is unknown: {error})"
        raise UntrustedExtentsError(reason, error.check) from error


def _judge(
    layers: Sequence[Layer],
    policy: TrustPolicy,
    verdicts: Verdicts,
    *,
    in_store: bool,
) -> Image:
    # Writers first: a layer that is being written may fail any other check.
    overridden = require_no_writers(layers, allowed=policy.allow_writers)
    overridden += [line for layer in layers for line in _unchecked(layer)]
    parents, found = Parents(layers[:1]), Judgement()
    problems: list[Problem] = []
    hinted: list[Hint] = []
    for layer in layers[1:]:
        found = judge_diff(parents, layer, policy, verdicts, in_store=in_store)
        problems += found.overridden
        hinted += found.hints
        parents.add(layer)
    overridden += override_lines(problems)
    view = MergedView(layers)
    return Image(view, found.dense, overridden, hints=tuple(hinted), problems=tuple(problems))


def _unchecked(layer: Layer) -> Iterator[str]:
    for record in layer.records:
        if record.unchecked:
            yield (
                f"--verify=no overrides the check of seals: {record.path}: {record.unchecked}"
                " ranges have no checksum and are not checked"
            )


class Judgement(NamedTuple):
    """Whether a diff is dense, the checks that the policy overrode, and the hints about damage."""

    dense: bool = False
    overridden: Sequence[Problem] = ()
    hints: Sequence[Hint] = ()


def judge_diff(
    parents: Parents,
    layer: Layer,
    policy: Trust,
    verdicts: Verdicts,
    *,
    in_store: bool,
) -> Judgement:
    """Check the diff `layer` over `parents`, of which there is at least one.

    `in_store` says that it is a link of a directory of snapshots. Such a link may be dense if a
    check supports it; an explicit diff only with `policy.dense`. Pages are read if no metadata can
    decide, and the result is kept in `verdicts`. Raises DiffMergeError if the diff cannot be
    trusted (law 4), has another size, or looks as if its holes were filled. For a diff that still
    has holes, the last is an error only if the policy is `strict`.
    """
    base = parents.layers[0]
    require_equal_size(base.path, base.size, layer.path, layer.size)
    dense = layer.extents.covers(layer.size)
    complete = dense and (in_store or policy.dense)
    overridden = require_trust(layer, policy, complete=complete)
    overridden += require_exact(parents, layer, policy, verdicts)
    if dense and not policy.dense:
        require_meant(parents, layer, verdicts, in_store=in_store)
    return Judgement(dense, overridden, hints(parents, layer, policy, verdicts))


def must_read_pages(parents: Parents, layer: Layer, policy: Trust, verdicts: Verdicts) -> bool:
    """Whether `judge_diff` has to read pages of a link of a directory of snapshots."""
    checks = _content_checks(layer, policy)
    return any(not verdicts.is_known(check.kind, parents, layer) for check in checks)


def read_pages(parents: Parents, layer: Layer, policy: Trust, verdicts: Verdicts) -> None:
    """Put into `verdicts` what `judge_diff` needs of pages. Blocks; raises DiffMergeError."""
    for check in _content_checks(layer, policy):
        check.result(parents, layer, verdicts)


def _content_checks(layer: Layer, policy: Trust) -> list[ContentCheck]:
    if layer.extents.covers(layer.size):
        return [] if policy.dense else [sample_check(layer)]
    return hole_checks(layer, policy)


def require_distinct(layers: Sequence[Layer]) -> None:
    """Raise BrokenChainError if two of the open layers are one file, whatever their paths."""
    known: dict[tuple[int, int], Layer] = {}
    for layer in layers:
        other = known.setdefault(layer.key[:2], layer)
        if other is not layer:
            raise BrokenChainError(
                f"{layer.path}: is the same file as the layer {other.path}; give the full image"
                " with --base, and each diff over it once with --diff, oldest first"
            )


def warn_of_order(view: MergedView) -> None:
    """Log a warning, which names two files, if the view's layers may be in the wrong order.

    Either the base has data but supplies no byte of the view, or it has less data than one of the
    diffs and less than half of its data is visible. That is no proof, because a guest may have
    written all of its memory. Reads no file.
    """
    base, *diffs = view.layers
    if not diffs or not base.extents.data_bytes:
        return
    held, shown = base.extents.data_bytes, view.visible_bytes()[0]
    largest = max(diffs, key=lambda diff: diff.extents.data_bytes)
    most = largest.extents.data_bytes
    if not shown or (held < most and shown * 2 < held):
        log.warning(
            "%s: the base has %d bytes of data, of which %d show in the image; the diff %s has %d:"
            " are they in the right order? --base is the full image, and each --diff lies over what"
            " comes before it",
            *(base.path, held, shown, largest.path, most),
        )
