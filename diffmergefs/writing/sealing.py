"""Writing seals, and removing those of files that are written."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from diffmergefs.core import beneath
from diffmergefs.core.errors import DenseDiffError, DiffMergeError, FileAccessError, SealError
from diffmergefs.core.extents import PAGE, ExtentList
from diffmergefs.core.failures import failures
from diffmergefs.core.identity import FileKey
from diffmergefs.core.layer import Layer
from diffmergefs.core.sparse import BLOCK, page_aligned
from diffmergefs.core.view import MergedView, require_equal_size
from diffmergefs.core.workers import Progress, SharedProgress, ignore_progress, in_threads
from diffmergefs.opening.content import Parents, Verdicts, require_meant
from diffmergefs.opening.filled import Hint, hints, require_exact
from diffmergefs.opening.images import open_snapshot, require_distinct, warn_of_order
from diffmergefs.opening.opener import Opener, opened_store
from diffmergefs.opening.trust import TrustPolicy, override_lines, require_trust
from diffmergefs.opening.writers import require_no_writers
from diffmergefs.sidecars import bmap, seal
from diffmergefs.sidecars.bmap import ABSENT, SEAL_SUFFIX, BlockMap
from diffmergefs.sidecars.presence import PRESENCE_SUFFIX
from diffmergefs.sidecars.verified import Remembered
from diffmergefs.stores.catalog import Catalog
from diffmergefs.writing.output import OutputFile, sync_directory

_MODES = 0o666
_DENSE = (
    "no hole in {} bytes: a diff whose holes a copy has filled looks like that; if it is a base or"
    " another complete image, use --dense"
)


@dataclass(frozen=True)
class SealResult:
    """What `seal_layer` did: the seal at `path` was 'written', 'rewritten' or is 'unchanged'.

    It has `ranges` of `data_bytes` bytes in all, in units of `block` bytes. `overridden` has a line
    for each failed check that the policy overrode, `hints` for what may be wrong with the layer
    without proof.
    """

    path: str
    outcome: str
    ranges: int
    data_bytes: int
    block: int
    overridden: tuple[str, ...]
    hints: tuple[str, ...]


def seal_layer(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    policy: TrustPolicy | None = None,
    parents: Sequence[Layer] = (),
    progress: Progress = ignore_progress,
) -> SealResult:
    """Write the seal of a layer whose extents are known to be right: `FILE.bmap` beside it.

    First the layer must pass the checks of law 4 as a diff, even if it is a base, and have no
    writer; one without a hole needs `policy.dense`. With the open layers below it, base first, as
    `parents`, its pages are also compared with theirs, and the order is checked (see
    `opening.images`). If it has a presence file, that one's extents are sealed. The
    seal is written atomically, with the layer's mode and, as root, its owner. An existing seal is
    replaced if it has the same extents and its checksums are right; otherwise only with `force`: it
    may be the only record of a diff that a copy has damaged. The layer is synced and read, never
    written. `progress` is given the layer's data bytes in all.

    Raises UntrustedExtentsError, DenseDiffError, WriterError, SealError (another seal is there),
    SizeMismatchError, LayerChangedError, NoSpaceError, and FileAccessError for every other failure
    of a file.
    """
    place = _Place(os.fspath(path), os.fspath(path))
    return _seal(place, parents, force, policy or TrustPolicy(), progress)


def seal_store(
    catalog: Catalog,
    *,
    force: bool = False,
    policy: TrustPolicy | None = None,
    jobs: int = 1,
    progress: Progress = ignore_progress,
) -> dict[str, SealResult | DiffMergeError]:
    """Seal the layer of each snapshot of a directory, and return the results and errors by tag.

    As `seal_layer`, each over its parents. A base, and a link that a check finds to be a complete
    image, may have no hole. A layer that several snapshots have is sealed for the first. The
    parents of all are opened before the first seal is written, with their seals; then `jobs` layers
    are read at a time. No symlink inside the directory is followed. `progress` gets 1 for each
    layer. Raises FileAccessError if the directory cannot be opened any more.
    """
    policy = policy or TrustPolicy()
    results: dict[str, SealResult | DiffMergeError] = {}
    parents: dict[FileKey, tuple[str, Sequence[Layer]]] = {}
    with opened_store(catalog.root, policy) as pool:
        for tag in sorted(catalog.snapshots):
            with _kept(results, tag):
                *below, link = catalog.chain(tag)
                layers = open_snapshot(below, pool, policy).view.layers if below else ()
                parents.setdefault(link.layer.key, (tag, layers))
        shared = SharedProgress(progress)

        def seal_one(job: tuple[str, Sequence[Layer]]) -> None:
            tag, layers = job
            path = catalog.snapshots[tag].layer.path
            with _kept(results, tag), beneath.passing(pool.roots, os.path.dirname(path)) as folder:
                name = os.path.join(catalog.root, path)
                place = _Place(os.path.basename(path), name, folder)
                results[tag] = _seal(place, layers, force, policy, stopping, in_store=True)
            shared.report(1)

        def stopping(count: int) -> None:
            shared.report(0)

        in_threads(seal_one, list(parents.values()), jobs, shared.stop)
    return dict(sorted(results.items()))


@contextmanager
def _kept(results: dict[str, SealResult | DiffMergeError], tag: str) -> Iterator[None]:
    try:
        yield
    except DiffMergeError as error:
        results[tag] = error.anew()
    except OSError as error:
        results[tag] = FileAccessError(f"{error.filename or tag}: {error.strerror}")


class _Place(NamedTuple):
    # A layer's path, beneath the directory `root` if there is one, and its name for messages.
    path: str
    name: str
    root: int | None = None

    def seal(self) -> tuple[str, str]:
        # The path of its seal for opening, and for messages.
        if self.root is None:
            where = _seal_path(self.path)
            return where, where
        return f"/proc/self/fd/{self.root}/{self.path}{SEAL_SUFFIX}", self.name + SEAL_SUFFIX


def _seal(
    place: _Place,
    parents: Sequence[Layer],
    force: bool,
    policy: TrustPolicy,
    progress: Progress,
    *,
    in_store: bool = False,
) -> SealResult:
    opener = Opener(replace(policy, no_seal=True))
    opened = opener.open(place.path, place.root, place.name, is_diff=True)
    with closing(opened) as layer, failures(place.name):
        require_distinct([*parents, layer])
        dense = policy.dense or in_store
        overridden = require_trusted(layer, replace(policy, dense=dense), _DENSE)
        below = Parents(parents) if parents else None
        hinted = _require_exact(below, layer, policy, overridden, in_store)
        existing = None if force else _existing_seal(place, layer)
        made = _map_of(layer, layer.extents, policy.page_size, progress)
        document = bmap.dump(made)
        location, where = place.seal()
        outcome = "rewritten" if os.path.lexists(location) else "written"
        if existing is not None and bmap.dump(existing.content) == document:
            outcome = "unchanged"
        else:
            replaces = force or existing is not None
            _publish(where, document, layer, force=replaces, location=location)
    data = sum(made.stops) - sum(made.starts)
    numbers = len(made), data, made.block
    return SealResult(where, outcome, *numbers, tuple(overridden), tuple(map(str, hinted)))


def write_seal(path: str, extents: ExtentList, page_size: int = PAGE) -> None:
    """Seal a file that was just written with data in exactly these extents; replace any seal.

    A presence file beside it is removed. Everything outside the extents must read as zeros. Raises
    LayerChangedError, NoSpaceError and FileAccessError.
    """
    with closing(Layer.open(path)) as layer, failures(path):
        made = _map_of(layer, extents, page_size)
        _publish(_seal_path(path), bmap.dump(made), layer, force=True)
    _remove(path, PRESENCE_SUFFIX)


def remove_seal(path: str) -> None:
    """Remove the seal and the presence file, if any, of a file that is or will be overwritten.

    The removal is synced. Raises FileAccessError.
    """
    _remove(path, SEAL_SUFFIX)
    _remove(path, PRESENCE_SUFFIX)


def _remove(path: str, suffix: str) -> None:
    for place in dict.fromkeys((path, os.path.realpath(path))):
        with failures(place + suffix):
            try:
                os.unlink(place + suffix)
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
                continue
            sync_directory(os.path.dirname(place) or ".")


def require_trusted(layer: Layer, policy: TrustPolicy, dense: str) -> list[str]:
    """Check that no process writes a diff, and its extents, law 4. Return what was overridden.

    Raises WriterError, UntrustedExtentsError, and, for a layer without a hole that is not vouched
    for, DenseDiffError with the text `dense`, in which `{}` stands for its size.
    """
    is_dense = layer.extents.covers(layer.size)
    overridden = require_no_writers([layer], allowed=policy.allow_writers)
    problems = require_trust(layer, policy, complete=is_dense and policy.dense)
    if is_dense and not policy.dense:
        raise DenseDiffError(f"{layer.path}: {dense.format(layer.size)}")
    return overridden + override_lines(problems)


def _require_exact(
    parents: Parents | None,
    layer: Layer,
    policy: TrustPolicy,
    overridden: list[str],
    in_store: bool,
) -> list[Hint]:
    verdicts = Verdicts(Remembered(policy.state_dir))
    if parents:
        base = parents.layers[0]
        require_equal_size(base.path, base.size, layer.path, layer.size)
        if not in_store:
            warn_of_order(MergedView([*parents.layers, layer]))
        elif layer.extents.covers(layer.size) and not policy.dense:
            require_meant(parents, layer, verdicts, in_store=True)
        problems = require_exact(parents, layer, policy, verdicts)
        overridden += override_lines(problems)
    return hints(parents, layer, policy, verdicts)


def _existing_seal(place: _Place, layer: Layer) -> seal.Stored[BlockMap] | None:
    # The existing seal, if it records what is found now. Any other may be worth more than a new
    # one.
    remedy = "; replace it with --force only if you know that the layer's holes are right now"
    try:
        found = seal.find(place.path, place.root, place.name)
        if found is None:
            return None
        seal.compare(layer, found)
    except SealError as error:
        raise SealError(f"{error}{remedy}") from error
    extents = found.content.extents()
    if extents != layer.extents:
        raise SealError(
            f"{found.path}: a seal whose checksums are right, but with {len(extents)}"
            f" extents of {extents.data_bytes} bytes, while the filesystem reports"
            f" {len(layer.extents)} of {layer.extents.data_bytes}: a copy may have damaged them, so"
            f" the seal is kept, and stays in force{remedy}"
        )
    return found


def _map_of(
    layer: Layer, extents: ExtentList, page: int, progress: Progress = ignore_progress
) -> BlockMap:
    buffer = page_aligned(BLOCK)
    digests = bytearray()
    for start, stop in extents:
        digests += seal.sha256(layer, start, stop, buffer, progress)
    layer.check_unchanged()
    starts, stops = array("Q", extents.starts), array("Q", extents.stops)
    block = _block(layer.size, extents, page)
    return BlockMap(layer.size, block, starts, stops, bytes(digests), frozenset())


def _block(size: int, extents: ExtentList, page: int) -> int:
    # The largest power of two, at most the guest's page, that divides all borders of extents.
    for border in (*extents.starts, *(stop for stop in extents.stops if stop != size)):
        while border % page:
            page //= 2
    return page


def _seal_path(path: str) -> str:
    beside = path + SEAL_SUFFIX
    if not os.path.islink(path) or os.path.lexists(beside):
        return beside
    return os.path.realpath(path) + SEAL_SUFFIX


def _publish(
    where: str, document: bytes, layer: Layer, *, force: bool, location: str | None = None
) -> None:
    with OutputFile(where, [layer.status], force=force, location=location) as file:
        file.write(document)
        with failures(where, file.target):
            if os.geteuid() == 0:
                os.fchown(file.target.fd, layer.status.st_uid, layer.status.st_gid)
        with failures(where):
            mode = layer.mode & _MODES
        file.finish(mode)
        layer.check_unchanged()
        file.publish()
