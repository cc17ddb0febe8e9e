"""All faults of the layers of an image, or of a whole directory of them, not only the first."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from diffmergefs.checks.verdict import Fault, Faults, LayerVerdict, Verdict
from diffmergefs.core.beneath import AllowedRoots
from diffmergefs.core.errors import BrokenChainError, PinError
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView, require_equal_size
from diffmergefs.core.workers import Progress, SharedProgress, ignore_progress, in_threads
from diffmergefs.opening.content import Parents, Verdicts
from diffmergefs.opening.filled import Hint, hints
from diffmergefs.opening.images import (
    judge_diff,
    require_distinct,
    require_known_base,
    warn_of_order,
)
from diffmergefs.opening.opener import LayerPool, Opener, opened_store
from diffmergefs.opening.pins import Hashes, is_pinned, require_pin
from diffmergefs.opening.trust import Problem, TrustPolicy, override_lines, require_trust
from diffmergefs.opening.writers import require_no_writers
from diffmergefs.sidecars import seal
from diffmergefs.sidecars.bmap import SEAL_SUFFIX, BlockMap
from diffmergefs.sidecars.verified import Remembered
from diffmergefs.stores.catalog import Catalog
from diffmergefs.stores.lookup import find_image, require_mergeable
from diffmergefs.stores.snapshot import Snapshot


@dataclass
class _Item:
    # A layer that is being verified; `link` if it is a snapshot's. It is judged once, however many
    # chains have it; `is_fit` says that nothing speaks against judging the diffs above over it.
    path: str | None
    has_parent: bool
    link: Snapshot | None = None
    layer: Layer | None = None
    pin: str | None = None
    sealed: str | None = None
    stored_seal: seal.Stored[BlockMap] | None = None
    faults: Faults = field(default_factory=Faults)
    overridden: list[str] = field(default_factory=list)
    hints: Sequence[Hint] = ()
    is_judged: bool = False
    is_fit: bool = False

    def verdict(self) -> LayerVerdict:
        size = None if self.layer is None else self.layer.size
        tag = None if self.link is None else self.link.tag
        return LayerVerdict(tag, self.path, size, self.pin, self.sealed)


class _Chain(NamedTuple):
    # The layers of an image, base first, and what is wrong with how they hang together.
    items: list[_Item]
    misfits: Faults

    def verdict(self) -> Verdict:
        faults = itertools.chain(self.misfits, *(item.faults for item in self.items))
        return Verdict(
            tuple(item.verdict() for item in self.items),
            tuple(faults),
            tuple(line for item in self.items for line in item.overridden),
            tuple(str(hint) for item in self.items for hint in item.hints),
        )


@dataclass(frozen=True)
class _Check:
    # A check that reads `size` bytes of the file at `path`, for an item, and reports them.
    item: _Item
    path: str
    size: int
    work: Callable[[Progress], None]


class Verification:
    """The open layers of images, checked by metadata; `verify` reads their bytes.

    Made by `open_image`, `open_store` and `open_layers`. As a context manager it closes the layers.
    """

    def __init__(self, chains: Mapping[str, _Chain], policy: TrustPolicy) -> None:
        self._chains = chains
        memory = Remembered(policy.state_dir)
        verdicts = Verdicts(memory, anew=True)
        for chain in chains.values():
            _judge(chain.items, policy, verdicts)
        items = {id(item): item for chain in chains.values() for item in chain.items}
        self._items = list(items.values())
        self._checks = [
            *_seal_checks(self._items, memory),
            *_pin_checks(chains.values(), Hashes(memory, anew=True)),
        ]

    def __enter__(self) -> Verification:
        return self

    def __exit__(self, *error: object) -> None:
        for item in self._items:
            if item.layer is not None:
                item.layer.close()

    @property
    def total_bytes(self) -> int:
        """The number of bytes that `verify` reads."""
        return sum(check.size for check in self._checks)

    def verify(self, progress: Progress = ignore_progress, jobs: int | None = None) -> Verdict:
        """The verdict on the only image, or on the last one. As `verify_all`."""
        return list(self.verify_all(progress, jobs).values())[-1]

    def verify_all(
        self, progress: Progress = ignore_progress, jobs: int | None = None
    ) -> dict[str, Verdict]:
        """Compare everything that has a checksum, and return all faults of each image, by its tag.

        Remembered results are ignored; good results are remembered, for mounts to use. Each layer
        is compared once, however many images have it, by one thread, and `jobs` layers at a time
        (by default one for each processor). `progress` gets `total_bytes` in total if there is no
        fault. Faults are returned, not raised: the chain's first, then each layer's, base first.
        Blocks; an interrupt ends it after one block of each thread.
        """
        shared = SharedProgress(progress)
        work = functools.partial(_faults_of, progress=shared.report)
        found = in_threads(work, self._checks, jobs or os.cpu_count() or 1, shared.stop)
        for check, faults in zip(self._checks, found, strict=True):
            check.item.faults += faults
        return {tag: chain.verdict() for tag, chain in self._chains.items()}


def _faults_of(check: _Check, progress: Progress) -> list[Fault]:
    faults = Faults()
    with faults.noted(check.path):
        check.work(progress)
    return faults


def open_image(path: str, policy: TrustPolicy) -> Verification:
    """Open the IMAGE `path`, a snapshot directory or a numbered layer file, for its checks.

    A broken chain (a missing parent, a cycle, metadata) is a fault of the result, and the layers
    above are opened all the same. Raises DiffMergeError if `path` is not an image.
    """
    catalog, tag = find_image(path, policy)
    if tag not in catalog.snapshots:
        catalog.chain(tag)
    return _open_snapshots(catalog, [tag], policy)


def open_store(catalog: Catalog, policy: TrustPolicy) -> Verification:
    """Open all snapshots of a directory for their checks, as `open_image` does. Parents come first.

    Raises FileAccessError if the directory cannot be opened any more.
    """
    depths = {tag: len(catalog.reachable(tag)) for tag in catalog.snapshots}
    tags = sorted(depths, key=lambda tag: (depths[tag], tag))
    return _open_snapshots(catalog, tags, policy)


def _open_snapshots(catalog: Catalog, tags: Sequence[str], policy: TrustPolicy) -> Verification:
    items: dict[str, _Item] = {}
    chains: dict[str, _Chain] = {}
    with opened_store(catalog.root, replace(policy, no_seal=True, verify="full")) as pool:
        for tag in tags:
            links = catalog.reachable(tag)
            for link in links:
                if link.tag not in items:
                    items[link.tag] = item = _opened(link, pool, catalog.root)
                    if not policy.no_seal:
                        _adopt_seal(item, pool.roots)
            misfits = Faults()
            for misfit in catalog.misfits(tag):
                misfits.add(misfit)
            chains[tag] = _Chain([items[link.tag] for link in links], misfits)
    return Verification(chains, policy)


def _opened(link: Snapshot, pool: LayerPool, root: str) -> _Item:
    path = link.memory and os.path.join(root, link.memory.path)
    item = _Item(path, link.parent is not None, link)
    if (pinned := is_pinned(link)) is not None:
        item.pin = "unknown" if pinned else "unpinned"
    with item.faults.noted(item.path):
        if link.problem is not None:
            raise BrokenChainError(link.problem)
        item.layer = pool.layer(link.layer)
    return item


def _adopt_seal(item: _Item, root: AllowedRoots | None = None) -> None:
    # It counts as wrong until it has been compared. If it cannot be used, the filesystem's extents
    # stay, so that other faults are found too.
    if item.layer is None:
        return
    item.sealed = "wrong"
    path = item.link.layer.path if item.link else item.layer.path
    with item.faults.noted(item.path):
        item.stored_seal = seal.find(path, root, item.layer.path)
        if item.stored_seal is None:
            item.sealed = None
        else:
            seal.adopt(item.layer, item.stored_seal, is_checked=True)


def open_layers(base: str, diffs: Sequence[str], policy: TrustPolicy) -> Verification:
    """Open explicit layers, oldest first, for their checks. They record no parents.

    An order that looks wrong is logged as a warning.
    """
    misfits = Faults()
    items = [_Item(path, number > 0) for number, path in enumerate((base, *diffs))]
    opener = Opener(replace(policy, no_seal=True, verify="full"))
    with misfits.noted():
        require_mergeable(base, diffs)
    for item in items:
        with item.faults.noted(item.path):
            item.layer = opener.open(item.path or "", is_diff=item.has_parent)
        if not policy.no_seal:
            _adopt_seal(item)
    layers = [item.layer for item in items if item.layer is not None]
    with misfits.noted():
        require_distinct(layers)
        if len(layers) == len(items) and len({layer.size for layer in layers}) == 1:
            warn_of_order(MergedView(layers))
    return Verification({"": _Chain(items, misfits)}, policy)


def _judge(items: Sequence[_Item], policy: TrustPolicy, verdicts: Verdicts) -> None:
    # Writers, sizes and law 4. A diff is judged over its parents while none of them is at fault,
    # and by itself above that.
    fit = Parents()
    for number, item in enumerate(items):
        if item.layer is None:
            continue
        if not item.is_judged:
            item.is_judged = True
            _judge_layer(item, item.layer, fit, len(fit.layers) == number > 0, policy, verdicts)
        if item.is_fit:
            fit.add(item.layer)


def _judge_layer(
    item: _Item,
    layer: Layer,
    below: Parents,
    is_complete: bool,
    policy: TrustPolicy,
    verdicts: Verdicts,
) -> None:
    # `is_complete` says that `below` are all layers below it.
    with item.faults.noted(item.path):
        item.overridden += require_no_writers([layer], allowed=policy.allow_writers)
    problems: Sequence[Problem] = ()
    with item.faults.noted(item.path):
        if item.link is not None and not item.has_parent:
            problems = require_known_base(layer, item.link.doubt, policy)
        for base in below.layers[:1]:
            require_equal_size(base.path, base.size, layer.path, layer.size)
        if item.has_parent and is_complete:
            in_store = item.link is not None
            found = judge_diff(below, layer, policy, verdicts, in_store=in_store)
            problems, item.hints = found.overridden, found.hints
        elif item.has_parent:
            problems = require_trust(layer, policy, complete=layer.extents.covers(layer.size))
            item.hints = hints(None, layer, policy, verdicts)
        item.is_fit = True
    item.overridden += override_lines(problems)


def _seal_checks(items: Sequence[_Item], memory: Remembered) -> Iterator[_Check]:
    for item in items:
        layer, stored = item.layer, item.stored_seal
        if layer and stored and layer.record(SEAL_SUFFIX):
            work = functools.partial(_check_seal, item, layer, stored, memory)
            yield _Check(item, layer.path, seal.compared_bytes(layer, stored), work)


def _check_seal(
    item: _Item,
    layer: Layer,
    stored: seal.Stored[BlockMap],
    memory: Remembered,
    progress: Progress,
) -> None:
    seal.compare_once(layer, stored, memory, progress, anew=True)
    item.sealed = "verified"


def _pin_checks(chains: Iterable[_Chain], hashes: Hashes) -> Iterator[_Check]:
    seen: set[int] = set()
    for chain in chains:
        for parent, item in itertools.pairwise(chain.items):
            if parent.layer is None or item.pin != "unknown" or id(item) in seen:
                continue
            seen.add(id(item))
            work = functools.partial(_check_pin, parent.layer, item, hashes)
            yield _Check(item, parent.layer.path, parent.layer.size, work)


def _check_pin(parent: Layer, item: _Item, hashes: Hashes, progress: Progress) -> None:
    assert item.link is not None
    try:
        require_pin(parent, item.link, hashes, progress)
    except PinError:
        item.pin = "wrong"
        raise
    item.pin = "verified"
