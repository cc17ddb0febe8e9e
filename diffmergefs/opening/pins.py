"""Parents' pins: the sha256 that a snapshot records of its parent's own memory file."""

from __future__ import annotations

import hashlib
import time

from diffmergefs.core import sparse
from diffmergefs.core.errors import PinError
from diffmergefs.core.identity import FileVersion
from diffmergefs.core.layer import Layer
from diffmergefs.core.singleflight import SingleFlight
from diffmergefs.core.sparse import BLOCK, ZEROS, page_aligned
from diffmergefs.core.workers import Progress, ignore_progress
from diffmergefs.sidecars.verified import Identity, Remembered
from diffmergefs.stores.snapshot import Snapshot

KIND = "sha256"


def content_hash(layer: Layer, progress: Progress = ignore_progress) -> str:
    """The hex sha256 of all bytes of the layer's file as read, whatever its extents or seal say.

    Holes are not read, because that would fill the page cache with zeros; the filesystem is asked
    again where they are. The fingerprint is compared afterwards (law 6). Blocks while other threads
    run. Raises LayerChangedError and OSError.
    """
    digest = hashlib.sha256()
    buffer = page_aligned(BLOCK)
    position = 0
    for start, stop in sparse.data_extents(layer.fd, layer.size):
        _add_zeros(digest, start - position, progress)
        for offset in range(start, stop, BLOCK):
            block = buffer[: min(BLOCK, stop - offset)]
            layer.read_into(block, offset)
            digest.update(block)
            progress(len(block))
        position = stop
    _add_zeros(digest, layer.size - position, progress)
    layer.check_unchanged()
    return digest.hexdigest()


def _add_zeros(digest: hashlib._Hash, count: int, progress: Progress) -> None:
    for done in range(0, count, BLOCK):
        block = ZEROS[: count - done]
        digest.update(block)
        progress(len(block))


class Hashes:
    """The sha256 of layers' files, computed once for each content; safe for several threads.

    `memory` keeps the hashes for later runs. With `anew`, hashes of earlier runs are ignored.
    """

    def __init__(self, memory: Remembered, *, anew: bool = False) -> None:
        self._memory = memory
        self._anew = anew
        self._computed: dict[FileVersion, str] = {}
        self._recalled: dict[Identity, str] = {}
        self._computing: SingleFlight[tuple[str, object]] = SingleFlight()

    def of(
        self, layer: Layer, expected: str | None = None, progress: Progress = ignore_progress
    ) -> str:
        """The hex sha256 of the layer's file, read only if it is not known.

        If a hash is `expected`, a remembered one counts only if it is equal, so a damaged memory
        never makes a good file look wrong. If another thread hashes the file, this one waits.
        `progress` gets the layer's size in total, read or not. Blocks. Raises LayerChangedError and
        OSError.
        """
        identity = Identity.of_open(layer.fd)
        if (known := self._known(identity, expected)) is None:
            me = object()
            # An error belongs to the layer as it was opened: one opened later may be right.
            key = identity.version, layer.fingerprint
            known, by = self._computing.do(
                key, lambda: self._compute(layer, identity, progress, me)
            )
            if by is me:
                return known
        layer.check_unchanged()
        progress(layer.size)
        return known

    def _known(self, identity: Identity, expected: str | None) -> str | None:
        return self._computed.get(identity.version) or self._recall(identity, expected)

    def _recall(self, identity: Identity, expected: str | None) -> str | None:
        known = self._recalled.get(identity)
        if known is None and not self._anew:
            known = self._memory.recall(KIND, identity)
        if known is None or expected not in (None, known):
            return None
        self._recalled[identity] = known
        return known

    def _compute(
        self, layer: Layer, identity: Identity, progress: Progress, who: object
    ) -> tuple[str, object]:
        # Returns with `who` if this call read the file, and None if another one was faster.
        if (done := self._computed.get(identity.version)) is not None:
            return done, None
        since_ns = time.time_ns()
        found = self._computed[identity.version] = content_hash(layer, progress)
        self._memory.remember(KIND, identity, found, since_ns)
        return found, who


def is_pinned(link: Snapshot) -> bool | None:
    """Whether the snapshot records its parent's hash; None for a base, which has no parent."""
    return None if link.parent is None else link.parent_hash is not None


def require_pin(
    parent: Layer,
    link: Snapshot,
    hashes: Hashes,
    progress: Progress = ignore_progress,
) -> None:
    """Raise PinError, with both hashes, unless `parent` has the content that `link` records.

    `parent` is the open layer of the link's parent. A link that records no hash accepts any
    content. Blocks for the hash. Raises LayerChangedError and OSError too.
    """
    if link.parent_hash is None:
        return
    found = hashes.of(parent, link.parent_hash, progress)
    if found != link.parent_hash:
        raise PinError(
            f"{parent.path}: its sha256 is {found}, but '{link.tag}' was taken over a parent with"
            f" {link.parent_hash} (parent_content_hash); put that file back, or take the diff again"
        )
