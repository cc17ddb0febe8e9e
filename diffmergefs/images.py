"""Opening images: from an IMAGE of the command line, or a snapshot of a catalog, to its view."""

from __future__ import annotations

import bisect
import errno
import itertools
import math
import os
import resource
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from diffmergefs.catalog import Catalog, read_catalog
from diffmergefs.errors import (
    DenseDiffError,
    DiffMergeError,
    FileAccessError,
    LayerChangedError,
)
from diffmergefs.layer import FileKey, Layer
from diffmergefs.numbered import SUFFIXES
from diffmergefs.snapshot import Snapshot, StoredFile
from diffmergefs.trust import TrustPolicy, require_trust
from diffmergefs.view import MergedView, require_equal_size

_SAMPLE = 4096
_SPARE = 128
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Image:
    """An open image: its view, and what was found while its layers were judged.

    `dense` says that the newest layer is a complete image in spite of its parent; `overridden` has
    a line for each check of law 4 that failed and that the policy overrode.
    """

    view: MergedView
    dense: bool = False
    overridden: list[str] = field(default_factory=list)


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

    `root` is a descriptor of that directory, kept by the caller, and `where` what messages put
    before the paths beneath it. A layer lives as long as a view uses it. Safe to use from several
    threads: a layer that one of them opens is waited for by the others.
    """

    def __init__(self, root: int, where: str = "") -> None:
        self._root = root
        self._where = where
        self._layers: weakref.WeakValueDictionary[FileKey, Layer] = weakref.WeakValueDictionary()
        # A lock lives as long as somebody opens that layer.
        self._busy: weakref.WeakValueDictionary[FileKey, threading.Lock]
        self._busy = weakref.WeakValueDictionary()
        self._guard = threading.Lock()

    def layer(self, file: StoredFile) -> Layer:
        """The open layer of `file`, opened, synced and walked if it is not open yet.

        Raises LayerChangedError if another content stands at its path by now.
        """
        with self._guard:
            busy = self._busy.setdefault(file.key, threading.Lock())
        with busy:
            known = self._layers.get(file.key)
            if known is not None and not known.tainted:
                return known
            name = os.path.join(self._where, file.path)
            layer = Layer.open(file.path, self._root, name)
            try:
                require_spare_descriptors(layer.fd, name)
            except OSError as error:
                raise FileAccessError(f"{name}: {error.strerror}") from error
            if layer.key != file.key:
                raise LayerChangedError(f"{name}: changed since it was looked over; try again")
            self._layers[file.key] = layer
            return layer


def open_chain(
    base: str | os.PathLike[str],
    diffs: Sequence[str | os.PathLike[str]] = (),
    policy: TrustPolicy | None = None,
) -> Image:
    """Open explicit layers, oldest first, as one image.

    The files must exist and have one size; they are synced and walked, never written. The diffs
    are held to law 4, and one without a hole is refused unless `policy.dense`. Raises
    DiffMergeError (see `diffmergefs.errors`).
    """
    policy = policy or TrustPolicy()
    layers = [Layer.open(os.fspath(path)) for path in (base, *diffs)]
    return _judge(layers, policy, in_store=False)


def open_image(path: str | os.PathLike[str], policy: TrustPolicy | None = None) -> Image:
    """Open a snapshot directory or a numbered layer file as one image.

    Its parents lie beside it; its layers are called by their absolute paths. A link without a hole
    is shown as complete only if a check against its parent supports it, or with `policy.dense`.
    Raises DiffMergeError.
    """
    catalog, tag = find_image(path)
    try:
        links = catalog.chain(tag)
    except DiffMergeError as error:
        raise type(error)(f"in {catalog.root}: {error}") from None
    root = os.open(catalog.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_snapshot(links, LayerPool(root, catalog.root), policy or TrustPolicy())
    finally:
        os.close(root)


def find_image(path: str | os.PathLike[str]) -> tuple[Catalog, str]:
    """The catalog of the directory in which the IMAGE `path` lies, and its tag there."""
    if not os.fspath(path):
        raise FileAccessError("'': an empty path names no image")
    image = os.path.abspath(path)
    image = os.path.realpath(image) if os.path.islink(image) else image
    root, name = os.path.split(image)
    if os.path.isdir(image):
        return read_catalog(root, "forkd"), name
    if not os.path.exists(image):
        raise FileAccessError(f"{os.fspath(path)}: No such file or directory")
    suffix = os.path.splitext(name)[1]
    # One of the usual suffixes is a layer's only if the lowest number's memory file has it too.
    catalog = read_catalog(root, "numbered", None if suffix in SUFFIXES else suffix or None)
    for tag, snapshot in catalog.snapshots.items():
        if snapshot.layer.path == name:
            return catalog, tag
    raise FileAccessError(
        f"{os.fspath(path)}: neither a snapshot directory nor a numbered layer (002-name.mem);"
        " name its layers with --base and --diff"
    )


def open_snapshot(links: Sequence[Snapshot], pool: LayerPool, policy: TrustPolicy) -> Image:
    """Open the chain `links`, base first, of a directory of snapshots. Raises DiffMergeError."""
    return _judge([pool.layer(link.layer) for link in links], policy, in_store=True)


def _judge(layers: Sequence[Layer], policy: TrustPolicy, *, in_store: bool) -> Image:
    overridden: list[str] = []
    dense = False
    for n, layer in enumerate(layers[1:], 1):
        require_equal_size(layers[0].path, layers[0].size, layer.path, layer.size)
        dense = layer.extents.covers(layer.size)
        complete = dense and (in_store or policy.dense)
        overridden += require_trust(layer, policy, complete=complete)
        if dense and not policy.dense:
            _require_meant(layers[:n], layer, in_store)
    return Image(MergedView(layers), dense, overridden)


def _require_meant(parents: Sequence[Layer], layer: Layer, in_store: bool) -> None:
    if not in_store:
        raise DenseDiffError(
            f"{layer.path}: a diff without a hole in {layer.size} bytes: it would hide all layers"
            " below; if it is a complete image, say so with --dense"
        )
    filled, sampled = count_filled_holes(MergedView(parents), layer)
    if filled * 2 > sampled:
        raise DenseDiffError(
            f"{layer.path}: looks like a diff whose holes were filled: {filled} of {sampled} pages"
            " that are not zero in its parent are zero in it; take the diff again, or say with"
            " --dense that it is a complete image"
        )


def count_filled_holes(parent: MergedView, layer: Layer, page: int = 4096) -> tuple[int, int]:
    """How many sampled pages are zero in `layer` though not in `parent`, and how many were sampled.

    The sample is up to 4,096 pages, spread evenly over those that are not zero in the parent. The
    first tells a diff whose holes a copy filled from a complete image.
    """
    zeros = bytes(page)
    filled = sampled = 0
    for offset in _spread_pages(parent, page):
        if sampled == _SAMPLE:
            break
        theirs = parent.read(offset, page)
        if theirs != zeros[: len(theirs)]:
            ours = bytearray(len(theirs))
            layer.read_into(memoryview(ours), offset)
            sampled += 1
            filled += ours == zeros[: len(ours)]
    layer.settle()
    return filled, sampled


def _spread_pages(view: MergedView, page: int) -> Iterator[int]:
    # Offsets of all pages over which the view has data, each once, in an order whose every prefix
    # is spread evenly: multiples of a step near the golden section of their count and coprime to
    # it run through all residues.
    firsts: list[int] = []
    counts: list[int] = []
    end = 0  # neighbouring segments may share a page, if the base's grain is smaller
    for start, stop, number in view.segments():
        first = max(start // page, end)
        if number is not None and first * page < stop:
            end = -(-stop // page)
            firsts.append(first)
            counts.append(end - first)
    behind = list(itertools.accumulate(counts))
    total = behind[-1] if behind else 0
    section = max(1, int(total * _GOLDEN))
    step = next(n for n in itertools.count(section) if math.gcd(n, total) == 1 or not total)
    for i in range(total):
        index = i * step % total
        run = bisect.bisect_right(behind, index)
        yield (firsts[run] + index - (behind[run] - counts[run])) * page
