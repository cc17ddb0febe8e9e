"""Seals: `FILE.bmap` beside a layer records its extents, whatever a copy does to its holes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from diffmergefs.core import beneath
from diffmergefs.core.beneath import Root
from diffmergefs.core.errors import DiffMergeError, SealError
from diffmergefs.core.extents import Extent
from diffmergefs.core.failures import described
from diffmergefs.core.identity import FileKey
from diffmergefs.core.layer import Layer, Record
from diffmergefs.core.sparse import BLOCK, ZEROS, page_aligned
from diffmergefs.core.workers import Progress, ignore_progress
from diffmergefs.sidecars import bmap
from diffmergefs.sidecars.bmap import ABSENT, SEAL_SUFFIX, BlockMap
from diffmergefs.sidecars.verified import Remembered

KIND = "seal"

T = TypeVar("T")

_WAY_OUT = (
    "restore the file from which it was made, or take the diff again; with --no-seal the"
    " filesystem's holes apply (wrong bytes if a copy has damaged them)"
)


@dataclass(frozen=True)
class Stored(Generic[T]):
    """A sidecar as it was read: its path for messages, identity, content and sha256."""

    path: str
    key: FileKey
    content: T
    digest: str


@dataclass(frozen=True)
class Format(Generic[T]):
    """A kind of sidecar: the suffix of its name, its error, its largest size, and its parser.

    `too_large` is the end of the message about a larger file.
    """

    suffix: str
    error: type[DiffMergeError]
    max_bytes: int
    too_large: str
    parse: Callable[[bytes, str], T]

    def find(
        self, path: str, root: Root | None = None, name: str | None = None
    ) -> Stored[T] | None:
        """The sidecar beside the layer `path`, which messages call `name`, or None if it has none.

        Without a `root` the layer may be a symlink: the sidecar is then beside the link or, if
        there is none, beside the link's target. Raises like `read`.
        """
        places = [path] if root is not None else dict.fromkeys((path, os.path.realpath(path)))
        for place in places:
            called = place if root is None or name is None else name
            with contextlib.suppress(FileNotFoundError):
                return self.read(place + self.suffix, root, called + self.suffix)
        return None

    def read(self, path: str, root: Root | None = None, name: str | None = None) -> Stored[T]:
        """The sidecar in the regular file `path`, beneath `root` if given; messages call it `name`.

        Raises FileNotFoundError, FileAccessError, and the format's error if the file is too large,
        changes while it is read, or is malformed.
        """
        name = path if name is None else name
        try:
            with open(beneath.open_regular(root, path), "rb") as file:
                key = FileKey.of(os.fstat(file.fileno()))
                if key.size > self.max_bytes:
                    raise self.error(f"{name}: {key.size} bytes, {self.too_large}")
                data = file.read(key.size + 1)
                if len(data) != key.size or FileKey.of(os.fstat(file.fileno())) != key:
                    raise self.error(f"{name}: changed while it was read; try again")
        except OSError as error:
            if error.errno in ABSENT:
                raise FileNotFoundError(error.errno, error.strerror, name) from error
            raise described(error, name) from error
        return Stored(name, key, self.parse(data, name), hashlib.sha256(data).hexdigest())


def _parse(data: bytes, name: str) -> BlockMap:
    # Imported only if there is a seal: it takes 30 ms, because the XML parser imports HTTP.
    from diffmergefs.sidecars.bmapreader import parse

    return parse(data, name)


_SEAL = Format(
    SEAL_SUFFIX,
    SealError,
    bmap.MAX_BYTES,
    f"a seal has at most {bmap.MAX_BYTES}; restore the one that was made with the layer, or ignore"
    " it with --no-seal",
    _parse,
)
find, read = _SEAL.find, _SEAL.read


def adopt(layer: Layer, seal: Stored[BlockMap], *, is_checked: bool) -> None:
    """Put the seal's extents in force. `is_checked` says that it was or will be compared.

    Raises SealError if it is for a file of another size, or contradicts the layer's presence file.
    """
    require_fit(layer, seal)
    extents = seal.content.extents()
    for record in layer.records:
        if extents != layer.extents:
            raise SealError(
                f"{seal.path}: disagrees with {record.path} about which pages hold data, so one of"
                " them belongs to another file; remove the seal if it was made without the other,"
                " or ignore it with --no-seal"
            )
    unchecked = 0 if is_checked else len(seal.content.bare)
    layer.adopt(extents, Record(SEAL_SUFFIX, seal.path, seal.key, seal.content.block, unchecked))


def compare_once(
    layer: Layer,
    seal: Stored[BlockMap],
    memory: Remembered,
    progress: Progress = ignore_progress,
    *,
    anew: bool = False,
) -> None:
    """`compare`, unless `memory` has an earlier success and `anew` is false.

    Raises like `compare`, but FileAccessError instead of OSError.
    """
    memory.compare_once(KIND, layer, seal.digest, lambda: compare(layer, seal, progress), anew=anew)


def require_fit(layer: Layer, seal: Stored[BlockMap]) -> None:
    """Raise SealError unless the seal is for a file of the layer's size."""
    if seal.content.size != layer.size:
        raise SealError(
            f"{seal.path}: a seal for {seal.content.size} bytes, but {layer.path} has {layer.size};"
            f" {_WAY_OUT}"
        )


def compare(layer: Layer, seal: Stored[BlockMap], progress: Progress = ignore_progress) -> None:
    """Raise SealError for the first range of the layer's file that differs from the seal.

    Each range must have its checksum, or be zeros if the seal has none, and all data outside the
    ranges must read as zeros. `progress` gets `compared_bytes` in total. The fingerprint is
    compared at the end (law 6). Blocks. Raises LayerChangedError and OSError.
    """
    require_fit(layer, seal)
    buffer = page_aligned(BLOCK)

    def require_zeros(start: int, stop: int, what: str) -> None:
        for part in _parts(layer, start, stop, buffer):
            if part != ZEROS[: len(part)]:
                raise SealError(
                    f"{seal.path}: a stale seal: bytes [{start}, {stop}) of {layer.path} are {what}"
                    f" must be zeros, but are not; {_WAY_OUT}"
                )
            progress(len(part))

    for start, stop, recorded in seal.content.ranges():
        if recorded is None:
            require_zeros(start, stop, "without a checksum, so")
            continue
        found = sha256(layer, start, stop, buffer, progress)
        if found != recorded:
            raise SealError(
                f"{seal.path}: a stale seal: the sha256 of bytes [{start}, {stop}) of {layer.path}"
                f" is {found.hex()}, it records {recorded.hex()}; {_WAY_OUT}"
            )
    for start, stop in _outside(layer, seal):
        require_zeros(start, stop, "a hole by its seal, and")
    layer.check_unchanged()


def compared_bytes(layer: Layer, seal: Stored[BlockMap]) -> int:
    """How many bytes `compare` reads if it finds no difference."""
    ranges = sum(seal.content.stops) - sum(seal.content.starts)
    return ranges + sum(stop - start for start, stop in _outside(layer, seal))


def sha256(
    layer: Layer,
    start: int,
    stop: int,
    buffer: memoryview,
    progress: Progress = ignore_progress,
) -> bytes:
    """The sha256 of a range of the layer's file; the caller must call `check_unchanged`."""
    digest = hashlib.sha256()
    for part in _parts(layer, start, stop, buffer):
        digest.update(part)
        progress(len(part))
    return digest.digest()


def _parts(layer: Layer, start: int, stop: int, buffer: memoryview) -> Iterator[memoryview]:
    for offset in range(start, stop, len(buffer)):
        part = buffer[: min(len(buffer), stop - offset)]
        layer.read_into(part, offset)
        yield part


def _outside(layer: Layer, seal: Stored[BlockMap]) -> Iterator[Extent]:
    # Data for the filesystem, but a hole for the seal. The filesystem's own holes read as zeros.
    return layer.walked.outside(seal.content.extents())
