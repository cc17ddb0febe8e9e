"""All faults of the layers of one image, not only the first."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from diffmergefs.checks.verdict import Fault, Faults, LayerVerdict, Verdict
from diffmergefs.core.beneath import AllowedRoots
from diffmergefs.core.errors import BrokenChainError, PinError
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView, require_equal_size
from diffmergefs.core.workers import Progress, ignore_progress, in_threads
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
from diffmergefs.stores.lookup import find_image, require_mergeable
from diffmergefs.stores.snapshot import Snapshot


@dataclass
class _Item:
    # A layer that is being verified; `link` if it is a snapshot's.
    path: str | None
    has_parent: bool
    link: Snapshot | None = None
    layer: Layer | None = None
    pin: str | None = None
    sealed: str | None = None
    stored_seal: seal.Stored[BlockMap] | None = None

    def verdict(self) -> LayerVerdict:
        size = None if self.layer is None else self.layer.size
        tag = None if self.link is None else self.link.tag
        return LayerVerdict(tag, self.path, size, self.pin, self.sealed)


@dataclass(frozen=True)
class _Check:
    # A check that reads `size` bytes of the file at `path` and reports them.
    path: str
    size: int
    work: Callable[[Progress], None]


class Verification:
    """The open layers of one image, checked by metadata; `verify` reads their bytes.

    Made by `open_image` and `open_layers`. As a context manager it closes the layers.
    """

    def __init__(self, items: Sequence[_Item], faults: Faults, policy: TrustPolicy) -> None:
        self._items = items
        self._faults = faults
        memory = Remembered(policy.state_dir)
        verdicts = Verdicts(memory, anew=True)
        self._overridden, self._hints = _judge(items, faults, policy, verdicts)
        self._checks = [
            *_seal_checks(items, memory),
            *_pin_checks(items, Hashes(memory, anew=True)),
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
        """Compare everything that has a checksum, and return all faults.

        Remembered results are ignored; good results are remembered, for mounts to use. Each file is
        read by one thread, `jobs` files at a time (by default one for each processor).
        `progress` gets `total_bytes` in total if there is no fault. Faults are returned, not
        raised: the chain's first, then each layer's, base first. Blocks; an interrupt ends it after
        one block of each thread.
        """
        reporter = _Reporter(progress)
        work = functools.partial(_faults_of, progress=reporter.report)
        found = in_threads(work, self._checks, jobs or os.cpu_count() or 1, reporter.stop)
        faults = itertools.chain.from_iterable(found)
        verdicts = tuple(item.verdict() for item in self._items)
        found_all = (*self._faults, *faults)
        return Verdict(verdicts, found_all, tuple(self._overridden), tuple(map(str, self._hints)))


class _Stopped(Exception):
    pass


class _Reporter:
    # Reports the progress of several threads, and stops them.

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stopped = False
        self._lock = threading.Lock()

    def report(self, count: int) -> None:
        with self._lock:
            if self._stopped:
                raise _Stopped
            self._progress(count)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True


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
    faults = Faults()
    for misfit in catalog.misfits(tag):
        faults.add(misfit)
    links = catalog.reachable(tag)
    with opened_store(catalog.root, replace(policy, no_seal=True, verify="full")) as pool:
        items = [_opened(link, pool, catalog.root, faults) for link in links]
        if not policy.no_seal:
            for item in items:
                _adopt_seal(item, faults, pool.roots)
    return Verification(items, faults, policy)


def _opened(link: Snapshot, pool: LayerPool, root: str, faults: Faults) -> _Item:
    path = link.memory and os.path.join(root, link.memory.path)
    item = _Item(path, link.parent is not None, link)
    if (pinned := is_pinned(link)) is not None:
        item.pin = "unknown" if pinned else "unpinned"
    with faults.noted(item.path):
        if link.problem is not None:
            raise BrokenChainError(link.problem)
        item.layer = pool.layer(link.layer)
    return item


def _adopt_seal(item: _Item, faults: Faults, root: AllowedRoots | None = None) -> None:
    # It counts as wrong until it has been compared. If it cannot be used, the filesystem's extents
    # stay, so that other faults are found too.
    if item.layer is None:
        return
    item.sealed = "wrong"
    path = item.link.layer.path if item.link else item.layer.path
    with faults.noted(item.path):
        item.stored_seal = seal.find(path, root, item.layer.path)
        if item.stored_seal is None:
            item.sealed = None
        else:
            seal.adopt(item.layer, item.stored_seal, is_checked=True)


def open_layers(base: str, diffs: Sequence[str], policy: TrustPolicy) -> Verification:
    """Open explicit layers, oldest first, for their checks. They record no parents.

    An order that looks wrong is logged as a warning.
    """
    faults = Faults()
    items = [_Item(path, number > 0) for number, path in enumerate((base, *diffs))]
    opener = Opener(replace(policy, no_seal=True, verify="full"))
    with faults.noted():
        require_mergeable(base, diffs)
    for item in items:
        with faults.noted(item.path):
            item.layer = opener.open(item.path or "", is_diff=item.has_parent)
        if not policy.no_seal:
            _adopt_seal(item, faults)
    layers = [item.layer for item in items if item.layer is not None]
    with faults.noted():
        require_distinct(layers)
        if len(layers) == len(items) and len({layer.size for layer in layers}) == 1:
            warn_of_order(MergedView(layers))
    return Verification(items, faults, policy)


def _judge(
    items: Sequence[_Item], faults: Faults, policy: TrustPolicy, verdicts: Verdicts
) -> tuple[list[str], list[Hint]]:
    # Writers, sizes and law 4. A diff is judged over its parents while none of them is at fault,
    # and by itself above that. Returns what was overridden, and the hints.
    overridden: list[str] = []
    hinted: list[Hint] = []
    fit = Parents()
    for number, item in enumerate(items):
        layer = item.layer
        if layer is None:
            continue
        with faults.noted(item.path):
            overridden += require_no_writers([layer], allowed=policy.allow_writers)
        problems: list[Problem] = []
        with faults.noted(item.path):
            if item.link is not None and not item.has_parent:
                problems += require_known_base(layer, item.link.doubt, policy)
            for base in fit.layers[:1]:
                require_equal_size(base.path, base.size, layer.path, layer.size)
            if item.has_parent and len(fit.layers) == number > 0:
                in_store = item.link is not None
                found = judge_diff(fit, layer, policy, verdicts, in_store=in_store)
                problems += found.overridden
                hinted += found.hints
            elif item.has_parent:
                complete = layer.extents.covers(layer.size)
                problems += require_trust(layer, policy, complete=complete)
                hinted += hints(None, layer, policy, verdicts)
            fit.add(layer)
        overridden += override_lines(problems)
    return overridden, hinted


def _seal_checks(items: Sequence[_Item], memory: Remembered) -> Iterator[_Check]:
    for item in items:
        layer, stored = item.layer, item.stored_seal
        if layer and stored and layer.record(SEAL_SUFFIX):
            work = functools.partial(_check_seal, item, layer, stored, memory)
            yield _Check(layer.path, seal.compared_bytes(layer, stored), work)


def _check_seal(
    item: _Item,
    layer: Layer,
    stored: seal.Stored[BlockMap],
    memory: Remembered,
    progress: Progress,
) -> None:
    seal.compare_once(layer, stored, memory, progress, anew=True)
    item.sealed = "verified"


def _pin_checks(items: Sequence[_Item], hashes: Hashes) -> Iterator[_Check]:
    for parent, item in itertools.pairwise(items):
        if parent.layer is not None and item.pin == "unknown":
            work = functools.partial(_check_pin, parent.layer, item, hashes)
            yield _Check(parent.layer.path, parent.layer.size, work)


def _check_pin(parent: Layer, item: _Item, hashes: Hashes, progress: Progress) -> None:
    assert item.link is not None
    try:
        require_pin(parent, item.link, hashes, progress)
    except PinError:
        item.pin = "wrong"
        raise
    item.pin = "verified"
