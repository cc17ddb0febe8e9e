"""One snapshot as its metadata describe it, and how these are read."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from diffmergefs.core import beneath
from diffmergefs.core.errors import BrokenChainError
from diffmergefs.core.identity import FileKey, FileVersion
from diffmergefs.sidecars.bmap import ABSENT, SEAL_SUFFIX
from diffmergefs.sidecars.presence import PRESENCE_SUFFIX

DOCUMENT = "snapshot.json"
MAX_DOCUMENT = 1 << 20
MAX_PARTS = 1 << 15
_MAX_NESTING = 64
_MAX_DIGITS = 1000
# A string, whole or cut off, or a character before or between values.
_PART = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{,]', re.DOTALL)
_SHOWN = 64  # the number of characters of a document in a message
#: The suffixes of the sidecars whose extents override the filesystem's.
RECORDS = (SEAL_SUFFIX, PRESENCE_SUFFIX)
_STAGING_SUFFIXES = (".tmp", ".part", ".partial", ".swp")


class StoredFile(NamedTuple):
    """A file of a directory of snapshots: its path and which content it has.

    The path is relative to the directory, or absolute and beneath one that the user allows
    (`beneath.AllowedRoots`). `records` are the layer's sidecars whose extents override the
    filesystem's: the suffix that their names add to the layer's (`.bmap`, for a diff also
    `.presence`), and which files they are.
    """

    path: str
    key: FileKey
    records: frozenset[tuple[str, FileKey]] = frozenset()


@dataclass(frozen=True)
class Snapshot:
    """One snapshot as it is stored.

    `parent` is the parent's tag, None for a base. `memory` is its layer, None where it could not
    be found. `folder` is its directory, relative to the root, if it has one. `files` are further
    files (name in the view -> path beneath the root), and `withheld` are paths beneath the root
    that a mount does not pass through. `device_state` are the files that belong to exactly this
    memory (path beneath the root -> the version that was seen, None if there was none), and
    `documents` the files that it was read from. `document` is the parsed snapshot.json,
    `document_status` the fstat of that file, and `parent_hash` the parent's sha256 as recorded
    there. `ranges` tells which guest memory the image's bytes are, if recorded: (address, length)
    in file order. `problem` is the reason why it is broken. `doubt` is the reason why a snapshot
    without a parent may not be a base, and what to do; it is a base only if its memory file has no
    hole.
    """

    tag: str
    parent: str | None = None
    memory: StoredFile | None = None
    folder: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    document: Mapping[str, Any] | None = None
    document_status: os.stat_result | None = None
    vmstate: str | None = None
    parent_hash: str | None = None
    ranges: tuple[tuple[int, int], ...] | None = None
    withheld: frozenset[str] = frozenset()
    problem: str | None = None
    doubt: str | None = None
    device_state: Mapping[str, FileVersion | None] = field(default_factory=dict)
    documents: Mapping[str, FileKey] = field(default_factory=dict)

    @property
    def layer(self) -> StoredFile:
        """Its memory file. Raises BrokenChainError if there is none."""
        if self.memory is None:
            raise BrokenChainError(self.problem or f"'{self.tag}' has no memory file")
        return self.memory

    @cached_property
    def state(self) -> frozenset[tuple[str, FileKey | FileVersion | None]]:
        """All files that it consists of: two catalogs with equal states saw the same snapshot."""
        files: dict[str, FileKey | FileVersion | None] = {**self.documents, **self.device_state}
        if self.memory is not None:
            files[self.memory.path] = self.memory.key
            files |= {self.memory.path + suffix: key for suffix, key in self.memory.records}
        return frozenset(files.items())

    @cached_property
    def newest_ns(self) -> int:
        """The latest mtime among these files."""
        return max((key.mtime_ns for _, key in self.state if key), default=0)


def is_left_out(name: str) -> bool:
    """Whether a mount never passes a file of this name through: temporary files of writers."""
    return name.startswith((".compact-staging-", ".diffmergefs-")) or name.endswith(
        _STAGING_SUFFIXES
    )


def status_of(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The lstat of a directory entry, or None if it was removed since it was listed."""
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None


def find_regular(root: beneath.Root, path: str) -> StoredFile | None:
    """The regular file `path` beneath `root`, or None if nothing has that name.

    Raises BrokenChainError if the name is anything else (a symlink is not followed).
    """
    try:
        status = beneath.stat_beneath(root, path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BrokenChainError(f"{path}: {error.strerror}") from error
    if stat.S_ISREG(status.st_mode):
        return StoredFile(path, FileKey.of(status))
    raise BrokenChainError(f"{path}: is not a regular file; nothing else is read")


def version_of(root: beneath.Root, path: str) -> FileVersion | None:
    """The present version of the file `path` beneath `root`, or None if there is none.

    Raises BrokenChainError if that is unknown.
    """
    try:
        return FileVersion.of(beneath.stat_beneath(root, path))
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise BrokenChainError(f"{path}: {error.strerror}") from error


def key_of(root: beneath.Root, path: str) -> FileKey | None:
    """As `version_of`, without what chmod and renaming change."""
    found = version_of(root, path)
    return None if found is None else FileKey(*found[:4])


def find_layer(root: beneath.Root, path: str, *, is_diff: bool = False) -> StoredFile | None:
    """`find_regular`, with the file's sidecars as `with_records` finds them."""
    file = find_regular(root, path)
    return file and with_records(root, file, is_diff=is_diff)


def with_records(root: beneath.Root, file: StoredFile, *, is_diff: bool) -> StoredFile:
    """The layer `file` with its sidecars. Whether they are valid is not checked."""
    suffixes = RECORDS if is_diff else (SEAL_SUFFIX,)
    found = {(suffix, key_of(root, file.path + suffix)) for suffix in suffixes}
    return file._replace(records=frozenset((suffix, key) for suffix, key in found if key))


def load_document(
    root: beneath.Root | None, path: str, limit: int = MAX_DOCUMENT, parts: int = MAX_PARTS
) -> dict[str, Any]:
    """The JSON object in the file `path` beneath `root`; it can be written as valid JSON again.

    With `root` None, `path` is any path. Raises BrokenChainError, in one line, for a file over
    `limit` bytes (1 MiB), for one that changes while it is read, and like `parse_document`.
    """
    return parse_document(read_small(root, path, limit), path, parts)


def parse_document(text: bytes, path: str, parts: int = MAX_PARTS) -> dict[str, Any]:
    """The JSON object in `text`; `path` is for messages.

    `parts` limits the number of strings, objects, arrays and commas together, because a value takes
    fifty times more memory than text. Raises BrokenChainError, in one line, for more parts, for
    text that is not UTF-8 or not JSON, for NaN, for numbers that do not fit (more than 1,000
    digits, or outside a float's range), for a duplicate key, for half of a surrogate pair, for
    nesting over 64, and for anything but an object.
    """
    if next(itertools.islice(_PART.finditer(text), parts, None), None) is not None:
        raise BrokenChainError(
            f"{path}: over {parts} strings, objects, arrays and commas; no snapshot has so many"
        )
    try:
        document = json.loads(
            text.decode(),
            parse_constant=_refuse,
            parse_int=_whole_number,
            parse_float=_finite_number,
            object_pairs_hook=_unique,
        )
        json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BrokenChainError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise BrokenChainError(f"{path}: holds a {type(document).__name__}, not a JSON object")
    if _is_nested_too_deep(document):
        raise BrokenChainError(f"{path}: nested more than {_MAX_NESTING} deep")
    return document


def read_small(root: beneath.Root | None, path: str, limit: int) -> bytes:
    """The whole of the regular file `path` beneath `root`, of at most `limit` bytes.

    With `root` None, `path` is any path. Raises BrokenChainError, in one line, for a larger file,
    for one that changes while it is read, and for one that cannot be read.
    """
    return read_with_status(root, path, limit)[0]


def read_with_status(
    root: beneath.Root | None, path: str, limit: int
) -> tuple[bytes, os.stat_result]:
    """As `read_small`, with the fstat of the file that was read."""
    try:
        fd = beneath.open_regular(root, path)
        with open(fd, "rb") as file:
            before = FileKey.of(os.fstat(fd))
            text = file.read(limit + 1)
            status = os.fstat(fd)
    except OSError as error:
        raise BrokenChainError(f"{path}: {error.strerror}") from error
    if len(text) > limit:
        name = os.path.basename(path)
        raise BrokenChainError(f"{path}: over {limit} bytes, too large for a {name}")
    if before != FileKey.of(status):
        raise BrokenChainError(f"{path}: changed while it was read; try again")
    return text, status


def _is_nested_too_deep(document: dict[str, Any]) -> bool:
    # json.dumps cannot write everything that json.loads can barely read.
    level: list[Any] = [document]
    for _ in range(_MAX_NESTING):
        inner = [v for outer in level for v in (outer.values() if type(outer) is dict else outer)]
        level = [value for value in inner if isinstance(value, (dict, list))]
    return bool(level)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _whole_number(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits, at most {_MAX_DIGITS} are allowed")
    return int(text)


def _finite_number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:_SHOWN]} is beyond the range of a float")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for name, value in pairs:
        if name in document:
            raise ValueError(f"the key {name[:_SHOWN]!r} appears twice")
        document[name] = value
    return document
