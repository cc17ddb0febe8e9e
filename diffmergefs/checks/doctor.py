"""Do the diffs of a path give right bytes on the filesystem on which they lie?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from diffmergefs.checks.diagnosis import Finding, examine_layer, wrong
from diffmergefs.checks.probe import examine_filesystem
from diffmergefs.core.errors import DiffMergeError, FileAccessError, ForeignFormatError, failures
from diffmergefs.core.layer import Layer
from diffmergefs.opening.content import Parents, Verdicts
from diffmergefs.opening.images import require_known_base
from diffmergefs.opening.opener import Opener, opened_store
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars.verified import Remembered
from diffmergefs.stores.catalog import Catalog, read_catalog
from diffmergefs.stores.lookup import find_image, layout_of
from diffmergefs.stores.snapshot import Snapshot


def examine_path(path: str, policy: TrustPolicy | None = None) -> Iterator[Finding]:
    """The findings on a directory of snapshots, a snapshot or layer in one, or any other path.

    First on the filesystem (see `probe.examine_filesystem`), then on each layer of the whole
    directory or of the snapshot's chain. A file that is not a layer of a directory of snapshots is
    checked as a diff with unknown parents. For a directory without snapshots only the filesystem is
    checked. Only `page_size`, `allow_outside`, `allow_gaps` and `state_dir` of `policy` are used:
    nothing is overridden here. No finding ends the checks. Layers are synced and walked; a sealed
    layer is compared with its seal, and the result is remembered. No layer is written. Raises
    FileAccessError, BrokenChainError if a directory is ambiguous, and ForeignFormatError if it is
    in a format that is declined.
    """
    policy = replace(policy or TrustPolicy(), no_seal=True)
    with failures(path):
        folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
        os.stat(path)
        on_filesystem = list(examine_filesystem(folder, policy.page_size))
    found = _snapshots_of(path, policy)
    yield from on_filesystem
    if found is not None:
        yield from _examine_snapshots(*found, policy)
    elif not os.path.isdir(path):
        yield from _examine_file(path, policy)
    else:
        yield Finding(path, "snapshots", "fine", "no snapshots here, so only its filesystem counts")


def _snapshots_of(path: str, policy: TrustPolicy) -> tuple[Catalog, list[str]] | None:
    # The catalog of the path, or of its directory, and the tags to check, parents first.
    if os.path.isdir(path):
        catalog = read_catalog(path, options=policy)
        if catalog.snapshots:
            depths = {tag: len(catalog.reachable(tag)) for tag in catalog.snapshots}
            return catalog, sorted(depths, key=lambda tag: (depths[tag], tag))
    image = os.path.realpath(path)
    for candidate in (image, os.path.dirname(image)):
        if os.path.isdir(candidate) and layout_of(candidate) is not None:
            catalog, tag = find_image(candidate, policy)
            if candidate == image or _is_layer(catalog, tag, image):
                return catalog, [link.tag for link in catalog.reachable(tag)]
    with suppress(FileAccessError, ForeignFormatError):  # _examine_file reports it
        if not os.path.isdir(path):
            catalog, tag = find_image(path, policy)
            return catalog, [link.tag for link in catalog.reachable(tag)]
    return None


def _is_layer(catalog: Catalog, tag: str, path: str) -> bool:
    memory = catalog.snapshots[tag].memory
    return memory is not None and os.path.realpath(os.path.join(catalog.root, memory.path)) == path


def _examine_snapshots(
    catalog: Catalog, tags: Sequence[str], policy: TrustPolicy
) -> Iterator[Finding]:
    with opened_store(catalog.root, policy, os.path.abspath(catalog.root)) as pool:
        layers: dict[str, Layer] = {}
        for tag in tags:
            snapshot = catalog.snapshots[tag]
            subject = _subject(catalog, snapshot)
            yield from _failure(subject, "chain", partial(catalog.chain, tag))
            try:
                layer = layers[tag] = pool.layer(snapshot.layer)
            except DiffMergeError as error:
                if snapshot.memory is not None:
                    yield wrong(subject, "access", error)
                continue
            in_doubt = _failure(
                layer.path, "chain", partial(require_known_base, layer, snapshot.doubt, policy)
            )
            yield from in_doubt
            below = catalog.reachable(tag)[:-1]
            known = [layers[link.tag] for link in below if link.tag in layers]
            is_complete = len(known) == len(below) and (known or snapshot.parent is None)
            parents = Parents(known) if is_complete and not in_doubt else None
            path = snapshot.layer.path
            yield from examine_layer(layer, parents, policy, pool.verdicts, pool.roots, path)


def _subject(catalog: Catalog, snapshot: Snapshot) -> str:
    name = snapshot.memory.path if snapshot.memory else snapshot.folder or snapshot.tag
    return os.path.join(os.path.abspath(catalog.root), name)


def _failure(subject: str, check: str, run: Callable[[], object]) -> list[Finding]:
    try:
        run()
    except DiffMergeError as error:
        return [wrong(subject, check, error)]
    return []


def _examine_file(path: str, policy: TrustPolicy) -> Iterator[Finding]:
    try:
        layer = Opener(policy).open(path, is_diff=True)
    except DiffMergeError as error:
        yield wrong(path, "access", error)
        return
    try:
        verdicts = Verdicts(Remembered(policy.state_dir))
        yield from examine_layer(layer, None, policy, verdicts)
    finally:
        layer.close()
