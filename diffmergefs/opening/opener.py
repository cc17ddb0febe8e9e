"""Opening layers: each file once, its extents from its sidecars if it has any."""

from __future__ import annotations

import errno
import os
import resource
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from diffmergefs.core import beneath, sparse
from diffmergefs.core.beneath import AllowedRoots, Root
from diffmergefs.core.errors import LayerChangedError, os_error
from diffmergefs.core.failures import failures
from diffmergefs.core.identity import FileKey
from diffmergefs.core.layer import Layer
from diffmergefs.core.singleflight import SingleFlight
from diffmergefs.opening.content import Verdicts
from diffmergefs.opening.trust import RecordOptions, TrustPolicy
from diffmergefs.opening.writers import Writers, writers
from diffmergefs.sidecars import presence, seal
from diffmergefs.sidecars.bmap import SEAL_SUFFIX
from diffmergefs.sidecars.presence import PRESENCE_SUFFIX
from diffmergefs.sidecars.verified import Remembered
from diffmergefs.stores.reader import open_source
from diffmergefs.stores.snapshot import StoredFile

_SPARE = 128

# A layer's file, and the records beside it that are in force, by suffix.
_Content = tuple[FileKey, frozenset[tuple[str, FileKey]]]


def raise_descriptor_limit() -> None:
    """Raise the limit of open files to its maximum: each distinct layer takes a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def require_spare_descriptors(fd: int, path: str) -> None:
    """Raise OSError (EMFILE) if `fd`, just opened, is among the last descriptors of this process.

    They are kept for reading directories and for the daemon's own needs, so that it continues
    however many files its users open.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and fd >= soft - min(_SPARE, soft // 4):
        raise os_error(errno.EMFILE, path)


class Opener:
    """Opens layers whose sidecars override the filesystem's extents. Safe for several threads.

    Sidecars are a seal, and for a diff a presence file. With the policy's `no_seal` seals are
    ignored. With `verify` 'pins' a sidecar is compared with its file once, and the result is
    remembered; with 'full' each time that a layer is opened; with 'no' never.
    """

    def __init__(self, policy: RecordOptions) -> None:
        self.policy = policy
        self._memory = Remembered(policy.state_dir)

    def open(
        self,
        path: str,
        root: beneath.Root | None = None,
        name: str | None = None,
        *,
        is_diff: bool = False,
    ) -> Layer:
        """`Layer.open`, and then the extents of the layer's sidecars instead of the filesystem's.

        Blocks for the fsync and the walk, and for a read of all data if a sidecar must be compared.
        Raises SealError and PresenceError for a sidecar that is wrong or does not fit, and
        FileAccessError.
        """
        layer = Layer.open(path, root, name)
        is_checked, anew = self.policy.compares, self.policy.anew
        if is_diff and (bits := presence.find(path, root, name)) is not None:
            presence.adopt(layer, bits)
            if is_checked:
                presence.compare_once(layer, bits, self._memory, anew=anew)
        if not self.policy.no_seal and (found := seal.find(path, root, name)) is not None:
            seal.adopt(layer, found, is_checked=is_checked)
            if is_checked:
                seal.compare_once(layer, found, self._memory, anew=anew)
        return layer


class LayerPool:
    """The open layers of a directory of snapshots, each file once, however many views share it.

    `root` is a descriptor of that directory that the caller keeps open, or a `beneath.AllowedRoots`
    if layers may lie outside. `where` is put before the paths beneath it in messages. A layer stays
    open while a view uses it. Safe for several threads: while one of them opens a layer, the others
    that need it wait. `verdicts` are the results of content checks.
    """

    def __init__(self, root: Root, policy: RecordOptions, where: str = "") -> None:
        self.roots = root if isinstance(root, AllowedRoots) else AllowedRoots(root)
        self._where = where
        self._opener = Opener(policy)
        self.verdicts = Verdicts(Remembered(policy.state_dir), anew=policy.anew)
        self._layers: weakref.WeakValueDictionary[_Content, Layer] = weakref.WeakValueDictionary()
        # For each layer, the first hole that looked like data when it was opened.
        self._cached: dict[FileKey, int] = {}
        self._opening: SingleFlight[Layer] = SingleFlight()

    def layer(self, file: StoredFile) -> Layer:
        """The open layer of `file`; it is opened by `Opener` if it is not open yet.

        Raises LayerChangedError if the layer or one of its sidecars was replaced meanwhile.
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
        layer = self._opener.open(file.path, self.roots, name, is_diff=is_diff)
        with failures(name):
            require_spare_descriptors(layer.fd, name)
        in_force = frozenset((record.suffix, record.key) for record in layer.records)
        if (layer.key, in_force) != content:
            raise LayerChangedError(f"{name}: changed since its directory was read; try again")
        self._layers[content] = layer
        self._cached.pop(layer.key, None)
        if len(layer.unmapped):
            self._cached[layer.key] = layer.unmapped.starts[0]
        return layer

    def has_writer(self, file: StoredFile) -> bool:
        """Whether a process has `file` open for writing now; False if that is unknown.

        The file is opened briefly and not walked. Raises OSError and FileAccessError.
        """
        with self._opened(file) as fd:
            return writers(fd) is Writers.SOME

    def has_cached_hole(self, file: StoredFile) -> bool:
        """Whether the hole of `file` that looked like data when it was last opened still does.

        Drops its cached pages first, unless a process has them mapped. The file is opened briefly
        and not walked. Raises OSError and FileAccessError.
        """
        if (hole := self._cached.get(file.key)) is None:
            return False
        with self._opened(file) as fd:
            return sparse.stays_data(fd, hole)

    def _opened(self, file: StoredFile) -> AbstractContextManager[int]:
        return beneath.closing_fd(beneath.open_regular(self.roots, file.path))

    def forget_all_but(self, present: set[FileKey]) -> None:
        """Forget the cached holes of files that are not in `present`."""
        for key in self._cached.keys() - present:
            self._cached.pop(key, None)


@contextmanager
def opened_store(root: str, policy: TrustPolicy, where: str | None = None) -> Iterator[LayerPool]:
    """A pool for the directory of snapshots `root`, which is open until the block ends.

    Layers that the pool has opened stay open. `where` is `LayerPool`'s, by default `root`. Raises
    FileAccessError if the directory cannot be opened.
    """
    with beneath.closing_fd(open_source(root)) as fd:
        roots = AllowedRoots(fd, policy.allow_outside)
        yield LayerPool(roots, policy, root if where is None else where)
