"""A diff's presence file: `FILE.presence` beside it says which of its pages are data."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass

from diffmergefs.core import beneath
from diffmergefs.core.errors import FileAccessError, PresenceError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.identity import FileKey
from diffmergefs.core.layer import Layer, Record
from diffmergefs.sidecars import presence_format
from diffmergefs.sidecars.bmap import ABSENT
from diffmergefs.sidecars.presence_format import PRESENCE_SUFFIX, Presence
from diffmergefs.sidecars.verified import Identity, Remembered

KIND = "presence"


@dataclass(frozen=True)
class StoredPresence:
    """A presence file as it was read: its path for messages, which file, its bitmap, its sha256."""

    path: str
    key: FileKey
    bits: Presence
    digest: str


def find(
    path: str, root: beneath.Root | None = None, name: str | None = None
) -> StoredPresence | None:
    """The presence file beside the diff `path`, which messages call `name`; None without one.

    Without a `root` the diff may be a symlink: then it is beside the link, or else beside the file.
    Raises PresenceError for what cannot be used, and FileAccessError.
    """
    places = [path] if root is not None else dict.fromkeys((path, os.path.realpath(path)))
    for place in places:
        called = (place if root is None or name is None else name) + PRESENCE_SUFFIX
        try:
            fd = beneath.open_regular(root, place + PRESENCE_SUFFIX)
        except OSError as error:
            if error.errno in ABSENT:
                continue
            raise FileAccessError(f"{called}: {error.strerror}") from error
        return _read(fd, called)
    return None


def _read(fd: int, name: str) -> StoredPresence:
    with open(fd, "rb") as file:
        key = FileKey.of(os.fstat(fd))
        if key.size > presence_format.MAX_BYTES:
            raise PresenceError(
                f"{name}: {key.size} bytes, a presence file has at most {presence_format.MAX_BYTES}"
            )
        try:
            data = file.read(key.size + 1)
        except OSError as error:
            raise FileAccessError(f"{name}: {error.strerror}") from error
        if len(data) != key.size or FileKey.of(os.fstat(fd)) != key:
            raise PresenceError(f"{name}: changed while it was read; try again")
    presence = presence_format.parse(data, name)
    return StoredPresence(name, key, presence, hashlib.sha256(data).hexdigest())


def adopt(layer: Layer, found: StoredPresence) -> None:
    """Put the extents of the bitmap in force. Raises PresenceError if it is for another size."""
    bits = found.bits
    expected = -(-layer.size // bits.page)
    if bits.pages != expected:
        raise PresenceError(
            f"{found.path}: for {bits.pages} pages of {bits.page} bytes, but {layer.path} has"
            f" {layer.size} bytes, which are {expected}; they do not belong together"
        )
    # The last page may reach beyond the end of the file.
    extents = ExtentList((start, min(stop, layer.size)) for start, stop in bits.extents)
    layer.adopt(extents, Record(PRESENCE_SUFFIX, found.path, found.key, bits.page))


def compare(layer: Layer, found: StoredPresence) -> None:
    """Raise PresenceError unless all bytes of the layer outside its present pages are zeros.

    Nothing binds a presence file to its diff but this: a page that was written since, and is not
    marked, shows that they are not of one save. What the filesystem calls a hole is not read. The
    fingerprint is compared at the end (law 6). Blocks. Raises LayerChangedError and OSError.
    """
    for start, stop in layer.walked.outside(layer.extents):
        if not layer.is_zero(start, stop):
            raise PresenceError(
                f"{found.path}: leaves out bytes [{start}, {stop}) of {layer.path}, which are not"
                " zeros: it is of another save; copy both files again, or save the snapshot again"
            )
    layer.check_unchanged()


def compare_once(
    layer: Layer, found: StoredPresence, memory: Remembered, *, anew: bool = False
) -> None:
    """`compare`, unless it is remembered that it was right (or, if `anew`, in any case).

    Raises like `compare`, but FileAccessError in place of OSError.
    """
    try:
        identity, since_ns = Identity.of_open(layer.fd), time.time_ns()
        if not anew and memory.recall(KIND, identity) == found.digest:
            layer.check_unchanged()
            return
        compare(layer, found)
        memory.remember(KIND, identity, found.digest, since_ns)
    except OSError as error:
        raise FileAccessError(f"{layer.path}: {error.strerror}") from error
