"""Opening images: from an IMAGE of the command line, or a snapshot of a catalog, to its view."""

from __future__ import annotations

import errno
import os
import resource
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from diffmergefs.core import beneath, sparse
from diffmergefs.core.beneath import AllowedRoots, Root
from diffmergefs.core.errors import (
    BrokenChainError,
    DiffMergeError,
    FileAccessError,
    LayerChangedError,
    UntrustedExtentsError,
)
from diffmergefs.core.identity import FileKey
from diffmergefs.core.layer import Layer
from diffmergefs.core.singleflight import SingleFlight
from diffmergefs.core.view import MergedView, require_equal_size
from diffmergefs.opening.contentchecks import Hint, hints, require_exact, require_meant
from diffmergefs.opening.contentverdicts import Parents, Verdicts
from diffmergefs.opening.explicit import require_distinct, warn_of_order
from diffmergefs.opening.opener import Opener
from diffmergefs.opening.pins import Hashes, require_pin
from diffmergefs.opening.trust import TrustPolicy, require_trust
from diffmergefs.opening.writers import Leases, Writers, require_no_writers, writers
from diffmergefs.sidecars.bmap import SEAL_SUFFIX
from diffmergefs.sidecars.presence_format import PRESENCE_SUFFIX
from diffmergefs.sidecars.verified import Remembered
from diffmergefs.stores.lookup import find_image, require_mergeable
from diffmergefs.stores.snapshot import Snapshot, StoredFile

_SPARE = 128

# A layer's file, and the records beside it that are in force, by suffix.
_Content = tuple[FileKey, frozenset[tuple[str, FileKey]]]


@dataclass(frozen=True)
class Image:
    """An open image: its view, and what was found while its layers were judged.

    `tags` are those of its layers, base first, where they lie in a directory of snapshots. `dense`
    says that the newest layer is a complete image in spite of its parent; `overridden` has
    a line for each check that failed and that the policy overrode: those of law 4, and whether
    someone has a layer open for writing. `hints` are about layers that may be harmed though nothing
    proves it, one for each at most.
    """

    view: MergedView
    dense: bool = False
    overridden: list[str] = field(default_factory=list)
    tags: tuple[str, ...] = ()
    hints: tuple[Hint, ...] = ()


def raise_descriptor_limit() -> None:
    """Let this process open as many files as it may: each distinct layer takes a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def require_spare_descriptors(fd: int, path: str) -> None:
    """Raise OSError (EMFILE) if `fd`, just opened, is among the last that this process can have.

    These are left for looking over directories and for what the daemon does for itself: however
    many files its users open, it goes on.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and fd >= soft - min(_SPARE, soft // 4):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)


class LayerPool:
    """The open layers of a directory of snapshots, each file once, however many views share it.

    `root` is a descriptor of that directory, kept by the caller (or a `beneath.AllowedRoots` of it,
    where layers lie outside), and `where` what messages put before the paths beneath it. A layer
    lives as long as a view uses it. Safe to use from several threads: while one of them opens a
    layer, the others that need it wait. `verdicts` are what was found in the layers' pages.
    """

    def __init__(self, root: Root, policy: TrustPolicy, where: str = "") -> None:
        self._root = root
        self._where = where
        self._opener = Opener(policy)
        self.verdicts = Verdicts(Remembered(policy.state_dir), anew=policy.verify == "full")
        self._layers: weakref.WeakValueDictionary[_Content, Layer] = weakref.WeakValueDictionary()
        # Where the first of a layer's holes lies that looked like data when it was opened.
        self._cached: dict[FileKey, int] = {}
        self._opening: SingleFlight[Layer] = SingleFlight()

    def layer(self, file: StoredFile) -> Layer:
        """The open layer of `file`, opened by `Opener` if it is not open yet.

        Raises LayerChangedError if another content stands at its path, or a record's, by now.
        """
        no_seal = self._opener.policy.no_seal
        records = {r for r in file.records if not (no_seal and r[0] == SEAL_SUFFIX)}
        content: _Content = file.key, frozenset(records)
        return self._opening.do(content, lambda: self._known(content) or self._open(file, content))

    def _known(self, content: _Content) -> Layer | None:
        known = self._layers.get(content)
        if known is None or known.tainted:
            return None
        if len(known.unmapped) and not sparse.stays_data(known.fd, known.unmapped.starts[0]):
            return None  # it can be walked exactly now
        return known

    def _open(self, file: StoredFile, content: _Content) -> Layer:
        name = os.path.join(self._where, file.path)
        is_diff = any(suffix == PRESENCE_SUFFIX for suffix, _ in content[1])
        layer = self._opener.open(file.path, self._root, name, is_diff=is_diff)
        try:
            require_spare_descriptors(layer.fd, name)
        except OSError as error:
            raise FileAccessError(f"{name}: {error.strerror}") from error
        in_force = frozenset((record.suffix, record.key) for record in layer.records)
        if (layer.key, in_force) != content:
            raise LayerChangedError(f"{name}: changed since it was looked over; try again")
        self._layers[content] = layer
        self._cached.pop(layer.key, None)
        if len(layer.unmapped):
            self._cached[layer.key] = layer.unmapped.starts[0]
        return layer

    def has_writer(self, file: StoredFile) -> bool:
        """Whether someone has `file` open for writing now, as far as can be told.

        It is opened for the moment, not walked. Raises OSError, FileAccessError.
        """
        with self._opened(file) as fd:
            return writers(fd) is Writers.SOME

    def has_cached_hole(self, file: StoredFile) -> bool:
        """Whether the hole of `file` that looked like data when it was last opened still does.

        Its cached pages are dropped for that, where nobody has them mapped; it is opened for the
        moment, not walked. Raises OSError, FileAccessError.
        """
        if (hole := self._cached.get(file.key)) is None:
            return False
        with self._opened(file) as fd:
            return sparse.stays_data(fd, hole)

    @contextmanager
    def _opened(self, file: StoredFile) -> Iterator[int]:
        fd = beneath.open_regular(self._root, file.path)
        try:
            yield fd
        finally:
            os.close(fd)

    def forget_all_but(self, present: set[FileKey]) -> None:
        """Forget what is remembered of files that are not open and not among these."""
        for key in self._cached.keys() - present:
            self._cached.pop(key, None)


def open_chain(
    base: str | os.PathLike[str],
    diffs: Sequence[str | os.PathLike[str]] = (),
    policy: TrustPolicy | None = None,
    leases: Leases | None = None,
) -> Image:
    """Open explicit layers, oldest first, as one image.

    The files must exist and have one size; they are synced and walked, never written. A layer with
    a seal beside it has the seal's extents, a diff with a presence file that one's, compared with
    its bytes first (`Opener`). The
    diffs are held to law 4, and one without a hole is refused unless `policy.dense`. A layer that
    someone has open for writing is refused, unless `policy.allow_writers`, where that can be told
    (see `lease.writers`); with `leases`, for a process that serves them, leases are kept on the
    layers. One file in two places, by a hard link too, is refused, and what makes their order look
    wrong (`explicit.warn_of_order`) is logged as a warning. Raises DiffMergeError (see
    `diffmergefs.core.errors`).
    """
    policy = policy or TrustPolicy()
    require_mergeable(os.fspath(base), [os.fspath(diff) for diff in diffs])
    opener = Opener(policy)
    layers = [opener.open(os.fspath(base))]
    layers += [opener.open(os.fspath(path), is_diff=True) for path in diffs]
    require_distinct(layers)
    verdicts = Verdicts(Remembered(policy.state_dir), anew=policy.verify == "full")
    image = _judge(layers, policy, leases, verdicts, in_store=False)
    warn_of_order(image.view)
    return image


def open_image(path: str | os.PathLike[str], policy: TrustPolicy | None = None) -> Image:
    """Open a snapshot directory or a numbered layer file as one image.

    Its parents lie beside it; its layers are called by their absolute paths. A link without a hole
    is shown as complete only if a check against its parent supports it, or with `policy.dense`. A
    layer that someone has open for writing is refused as by `open_chain`. A parent that is not what
    its child records of it (`parent_content_hash`) is refused, unless `policy.verify` is 'no': the
    whole file is read for that, once ('pins'), or each time ('full'). Raises DiffMergeError.
    """
    policy = policy or TrustPolicy()
    catalog, tag = find_image(path, policy.allow_outside, allow_gaps=policy.allow_gaps)
    try:
        links = catalog.chain(tag)
    except DiffMergeError as error:
        raise type(error)(f"in {catalog.root}: {error}") from None
    root = os.open(catalog.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        pool = LayerPool(AllowedRoots(root, policy.allow_outside), policy, catalog.root)
        image = open_snapshot(links, pool, policy)
    finally:
        os.close(root)
    if policy.verify != "no":
        _require_pins(image.view.layers, links, policy)
    return image


def _require_pins(layers: Sequence[Layer], links: Sequence[Snapshot], policy: TrustPolicy) -> None:
    hashes = Hashes(Remembered(policy.state_dir), anew=policy.verify == "full")
    for parent, link in zip(layers, links[1:], strict=False):
        try:
            require_pin(parent, link, hashes)
        except OSError as error:
            raise FileAccessError(f"{parent.path}: {error.strerror}") from error


def open_snapshot(
    links: Sequence[Snapshot],
    pool: LayerPool,
    policy: TrustPolicy,
    leases: Leases | None = None,
) -> Image:
    """Open the chain `links`, base first, of a directory of snapshots.

    `leases` is `open_chain`'s. Recorded hashes of parents are not compared. Raises DiffMergeError.
    """
    layers = [pool.layer(link.layer) for link in links]
    image = _judge(layers, policy, leases, pool.verdicts, in_store=True)
    overridden = image.overridden + require_known_base(layers[0], links[0].doubt, policy)
    return replace(image, overridden=overridden, tags=tuple(link.tag for link in links))


def require_known_base(layer: Layer, doubt: str | None, policy: TrustPolicy) -> list[str]:
    """Raise DiffMergeError if the lowest `layer` of a chain, about which there is a
    `Snapshot.doubt`, has a hole, or may have one; else the checks that the policy overrode.

    A record beside it says where its holes are; else law 4 says whether that can be told here.
    """
    if doubt is None:
        return []
    if not layer.extents.covers(layer.size):
        raise BrokenChainError(f"{layer.path}: has holes, and {doubt}")
    try:
        return require_trust(layer, policy, complete=True)
    except UntrustedExtentsError as error:
        reason = f"{layer.path}: may have holes, and {doubt} (here holes cannot be told: {error})"
        raise UntrustedExtentsError(reason, error.check) from error


def _judge(
    layers: Sequence[Layer],
    policy: TrustPolicy,
    leases: Leases | None,
    verdicts: Verdicts,
    *,
    in_store: bool,
) -> Image:
    # First of all: what is still being written may well look odd.
    overridden = require_no_writers(layers, allowed=policy.allow_writers, leases=leases)
    overridden += [line for layer in layers for line in _unchecked(layer)]
    parents, found = Parents(layers[:1]), Judgement()
    hinted: list[Hint] = []
    for layer in layers[1:]:
        found = judge_diff(parents, layer, policy, verdicts, in_store=in_store)
        overridden += found.overridden
        hinted += found.hints
        parents.add(layer)
    return Image(MergedView(layers), found.dense, overridden, hints=tuple(hinted))


def _unchecked(layer: Layer) -> Iterator[str]:
    for record in layer.records:
        if record.unchecked:
            yield (
                f"--verify=no overrides the check of seals: {record.path}: {record.unchecked}"
                " ranges without a checksum are taken as they are"
            )


class Judgement(NamedTuple):
    """Whether a diff is dense, the checks that the policy overrode, and the hints at harm."""

    dense: bool = False
    overridden: Sequence[str] = ()
    hints: Sequence[Hint] = ()


def judge_diff(
    parents: Parents,
    layer: Layer,
    policy: TrustPolicy,
    verdicts: Verdicts,
    *,
    in_store: bool,
) -> Judgement:
    """Judge the diff `layer` over `parents`, of which there is one at least.

    `in_store` says that it is a link of a directory of snapshots, which may be dense if a check
    supports it; an explicit diff may only with `policy.dense`. Pages are read where only they can
    tell, and what they told is kept in `verdicts`. Raises DiffMergeError if it cannot be trusted
    (law 4), is of another size, or looks like a diff whose holes were filled: with a hole, only if
    the policy is `strict`.
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
