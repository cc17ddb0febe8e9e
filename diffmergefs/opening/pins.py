"""Parents' pins: the sha256 that a snapshot records of its parent's own memory file."""

from __future__ import annotations

import hashlib
import time

from diffmergefs.core import sparse
from diffmergefs.core.buffers import BLOCK, ZEROS, page_aligned
from diffmergefs.core.errors import PinError
from diffmergefs.core.identity import FileVersion
from diffmergefs.core.layer import Layer
from diffmergefs.core.progress import Progress, ignore_progress
from diffmergefs.core.singleflight import SingleFlight
from diffmergefs.sidecars.verified import Identity, Remembered
from diffmergefs.stores.snapshot import Snapshot

KIND = "sha256"


def content_hash(layer: Layer, progress: Progress = ignore_progress) -> str:
    """The hex sha256 of all bytes of the layer's file as read, whatever its extents or seal say.

    Holes are not read (that would
    fill the page cache with zeros); the filesystem is asked anew where they are. The fingerprint
    is compared afterwards (law 6). Blocks; other threads run meanwhile. Raises LayerChangedError
    and OSError.
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

    What is computed is remembered in `memory` for later runs. `anew` believes nothing that an
    earlier run remembered.
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

        Where one is `expected`, a remembered hash counts only if it is that one: a damaged memory
        can let no good file look wrong. A file that another thread hashes is waited for.
        `progress` is given the layer's size in all, read or not. Blocks. Raises
        LayerChangedError and OSError.
        """
        identity = Identity.of_open(layer.fd)
        if (known := self._known(identity, expected)) is None:
            me = object()
            # An error is of the layer as it was opened: one that was opened later may be right.
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
        # With `who` has read the file, which may be somebody that was faster.
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

    `parent` is the open layer of the link's parent; a link that records no hash is content with
    any. Blocks for the hash. Raises LayerChangedError and OSError too.
    """
    if link.parent_hash is None:
        return
    found = hashes.of(parent, link.parent_hash, progress)
    if found != link.parent_hash:
        raise PinError(
            f"{parent.path}: its sha256 is {found}, but '{link.tag}' was taken over a parent with"
            f" {link.parent_hash} (parent_content_hash); put that file back, or take the diff again"
        )
