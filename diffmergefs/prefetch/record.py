"""Records of working sets, one JSON file per chain (format: docs/diffmergefs-prefetch.md)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from diffmergefs.core.beneath import closing_fd
from diffmergefs.core.errors import FileAccessError, counted
from diffmergefs.core.extents import MAX_LAYERS, PAGE, Extent, is_aligned
from diffmergefs.core.failures import failures
from diffmergefs.core.identity import FileKey
from diffmergefs.core.view import MergedView
from diffmergefs.sidecars import verified
from diffmergefs.writing.output import OutputFile

FORMAT = "diffmergefs working set"
VERSION = 1
#: The unit of a record: a page of the kernel's page cache, whatever page size the guest has.
MAX_RANGES = 1 << 18
_MAX_BYTES = 32 << 20
_DIRECTORY = "working-sets"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


class LayerFile(NamedTuple):
    """The file of a layer, by its real path, and its content, by what stat gives.

    The device number, which may change at a reboot, and the ctime do not count.
    """

    path: str
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> LayerFile:
        return cls(path, status.st_ino, status.st_size, status.st_mtime_ns)


#: The layers of a chain, base first.
Identity = tuple[LayerFile, ...]


def identity_of_view(view: MergedView) -> Identity:
    """The identity of an open image: its layers as they were opened, at their present paths.

    A layer that was unlinked since has a path that matches no record. Raises OSError.
    """
    return tuple(
        LayerFile.of(os.readlink(f"/proc/self/fd/{layer.fd}"), layer.status)
        for layer in view.layers
    )


def identity_of_files(paths: Iterable[str]) -> Identity:
    """The identity of the layers at these paths, base first. Opens none. Raises FileAccessError."""
    found = []
    for path in paths:
        with failures(path):
            found.append(LayerFile.of(os.path.realpath(path), os.stat(path)))
    return tuple(found)


@dataclass(frozen=True)
class WorkingSet:
    """What was recorded of one chain.

    `ranges` are half-open byte ranges in the order of their first touch. They are disjoint, and
    consist of whole pages of 4096 bytes, except at the end of the image. `recorded` is a time in
    UTC. `readahead_kib` is the kernel's readahead at that time (None: unknown); with more than 4,
    ranges are larger than what was touched.
    """

    layers: Identity
    ranges: tuple[Extent, ...]
    recorded: str
    readahead_kib: int | None = None

    @property
    def touched_bytes(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def stale(self, layers: Identity) -> str | None:
        """Why this record does not fit the chain `layers`, or None if it fits."""
        if len(layers) != len(self.layers):
            return f"it has {counted(len(self.layers), 'layer')}, the chain has {len(layers)}"
        for then, now in zip(self.layers, layers, strict=True):
            if then != now:
                return f"{now.path}: another file, or written to since"
        return None


def now() -> str:
    """The time for a new record."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def encode(record: WorkingSet) -> bytes:
    """The record in its stored form."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "recorded": record.recorded,
        "readahead_kib": record.readahead_kib,
        "layers": [layer._asdict() for layer in record.layers],
        "ranges": record.ranges,
    }
    return json.dumps(document, separators=(",", ":")).encode("ascii") + b"\n"


def decode(text: bytes) -> WorkingSet:
    """The record with this stored form. Raises ValueError, with one line, if there is none.

    Unknown fields are ignored: a change of meaning gets another version.
    """
    try:
        document = json.loads(text.decode("ascii"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError("not a record of a working set")
    if document.get("version") != VERSION or document["version"] is True:
        raise ValueError(f"version {document.get('version')!r}; only {VERSION} is supported")
    layers = tuple(_layer(fields) for fields in _list(document, "layers", 1, MAX_LAYERS))
    size = layers[0].size
    ranges = tuple(_range(pair, size) for pair in _list(document, "ranges", 0, MAX_RANGES))
    _require_disjoint(ranges)
    recorded, readahead = document.get("recorded"), document.get("readahead_kib")
    if not isinstance(recorded, str) or (readahead is not None and not _is_number(readahead)):
        raise ValueError("'recorded' or 'readahead_kib' has the wrong type")
    return WorkingSet(layers, ranges, recorded, readahead)


def _list(document: dict[str, Any], name: str, least: int, most: int) -> Sequence[Any]:
    found = document.get(name)
    if not isinstance(found, list) or not least <= len(found) <= most:
        raise ValueError(f"'{name}' is not a list of {least} to {most} entries")
    return found


def _layer(fields: Any) -> LayerFile:
    numbers: list[Any]
    if not isinstance(fields, dict) or not isinstance(fields.get("path"), str):
        raise ValueError("a layer without a path")
    inode, size, mtime_ns = numbers = [fields.get(n) for n in ("inode", "size", "mtime_ns")]
    if not all(map(_is_number, numbers)):
        raise ValueError(f"a layer whose inode, size and mtime_ns are {str(numbers)[:64]}")
    return LayerFile(fields["path"], inode, size, mtime_ns)


def _range(pair: Any, size: int) -> Extent:
    if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_number, pair)):
        raise ValueError(f"{str(pair)[:64]} is not a range")
    start, stop = pair
    whole = is_aligned(start, stop, PAGE, size)
    if not whole or not 0 <= start < stop <= size:
        raise ValueError(f"[{start}, {stop}) is not a range of pages of an image of {size} bytes")
    return Extent(start, stop)


def _require_disjoint(ranges: Iterable[Extent]) -> None:
    last = 0
    for start, stop in sorted(ranges):
        if start < last:
            raise ValueError(f"[{start}, {stop}) overlaps another range")
        last = stop


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class WorkingSets:
    """The records of one user, in `directory`: by default below the user's state directory.

    `state_dir` replaces the user's state directory. `save` and `prepare` create the directory with
    mode 0700. A directory or record that belongs to another user, or that others may write to, is
    not used. Records have mode 0600, because page numbers reveal what a guest did.
    """

    def __init__(self, directory: str | None = None, state_dir: str | None = None) -> None:
        """Raises FileAccessError if the user has no home and no directory is given."""
        if directory is None:
            directory = os.path.join(state_dir or _default_state(), _DIRECTORY)
        self.directory = directory

    def path(self, layers: Identity) -> str:
        """The path of the record for a chain of these paths, whatever their content."""
        paths = b"\0".join(os.fsencode(layer.path) for layer in layers)
        return os.path.join(self.directory, f"{hashlib.sha256(paths).hexdigest()[:32]}.json")

    def has_any(self) -> bool:
        """Whether there is a record of any chain. Never raises."""
        try:
            return any(name.endswith(".json") for name in os.listdir(self.directory))
        except OSError:
            return False

    def key(self, layers: Identity) -> FileKey | None:
        """The identity of the file that `load` would read, or None if there is none to see."""
        try:
            return FileKey.of(os.lstat(self.path(layers)))
        except OSError:
            return None

    def load(self, layers: Identity) -> WorkingSet | None:
        """The record for a chain of these paths, stale or not; None if there is none.

        Raises FileAccessError if it cannot be read, or is not safe to use.
        """
        path = self.path(layers)
        with failures(path):
            try:
                text = self._read(path)
            except FileNotFoundError:
                return None
        try:
            return decode(text)
        except ValueError as error:
            raise FileAccessError(f"{path}: {error}; --forget removes it") from error

    def save(self, record: WorkingSet) -> str:
        """Replace the previous record atomically, synced, and return the path.

        Raises FileAccessError, NoSpaceError.
        """
        path = self.path(record.layers)
        self.prepare()
        with OutputFile(path, (), force=True) as output:
            with failures(path, output.target), os.fdopen(os.dup(output.target.fd), "wb") as file:
                file.write(encode(record))
            output.finish(0o600)
            output.publish()
        return path

    def forget(self, layers: Identity) -> bool:
        """Remove the record, valid or not; False if there is none. Raises FileAccessError."""
        path = self.path(layers)
        with failures(path):
            try:
                os.unlink(path)
            except FileNotFoundError:
                return False
        return True

    def prepare(self) -> None:
        """Create the directory if necessary. Raises FileAccessError if it cannot be used."""
        with failures(self.directory):
            # The state directory is private too.
            for folder in (os.path.dirname(self.directory), self.directory):
                os.makedirs(folder, mode=0o700, exist_ok=True)
            verified.require_own(self.directory, os.stat(self.directory))
            if not os.access(self.directory, os.W_OK | os.X_OK, effective_ids=True):
                raise PermissionError(0, "is not writable")

    def _read(self, path: str) -> bytes:
        with closing_fd(os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)) as folder:
            verified.require_own(self.directory, os.fstat(folder))
            fd = os.open(os.path.basename(path), _READ, dir_fd=folder)
        with open(fd, "rb") as file:
            verified.require_own(path, os.fstat(fd))
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise OSError(0, f"has more than {_MAX_BYTES} bytes")
        return text


def _default_state() -> str:
    try:
        return verified.default_directory()
    except KeyError:
        raise FileAccessError(
            f"user {os.geteuid()} has no home directory; use --working-set-dir"
        ) from None
