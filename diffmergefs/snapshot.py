"""What is known of one snapshot by metadata alone."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from diffmergefs import beneath
from diffmergefs.bmap import ABSENT, SEAL_SUFFIX
from diffmergefs.errors import BrokenChainError
from diffmergefs.layer import FileKey

MAX_DOCUMENT = 1 << 20
_MAX_NESTING = 64
_MAX_DIGITS = 1000
_SHOWN = 64  # characters of a document that stand in a message
_STAGING_SUFFIXES = (".tmp", ".part", ".partial", ".swp")


class StoredFile(NamedTuple):
    """A file of a directory of snapshots: its path and which content it has.

    The path is relative to the directory, or absolute and beneath one that the user allows
    (`beneath.Reach`). `seal` says which file stands at the path with `.bmap` added, for a layer.
    """

    path: str
    key: FileKey
    seal: FileKey | None = None


@dataclass(frozen=True)
class Snapshot:
    """One snapshot as it is stored.

    `parent` is the parent's tag, None for a base. `memory` is its layer, None where it could not
    be found. `folder` is the directory, relative to the root, whose files go with it if it has
    one; `files` names further ones (name in the view -> path beneath the root). `document` is the
    parsed snapshot.json, `parent_hash` the parent's sha256 as recorded there. `problem` is the
    reason why it cannot be shown. `newest_ns` is the latest mtime among its files; two looks with
    the same `state` saw the same files.
    """

    tag: str
    parent: str | None = None
    memory: StoredFile | None = None
    folder: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    document: Mapping[str, Any] | None = None
    vmstate: str | None = None
    parent_hash: str | None = None
    problem: str | None = None
    newest_ns: int = 0
    state: frozenset[tuple[str, FileKey]] = frozenset()

    @property
    def layer(self) -> StoredFile:
        """Its memory file. Raises BrokenChainError where there is none."""
        if self.memory is None:
            raise BrokenChainError(self.problem or f"'{self.tag}' has no memory file")
        return self.memory


def is_left_out(name: str) -> bool:
    """Whether a file of this name is never passed through: staging names and seals' own."""
    return name.startswith((".compact-staging-", ".diffmergefs-")) or name.endswith(
        _STAGING_SUFFIXES
    )


def status_of(entry: os.DirEntry[str]) -> os.stat_result | None:
    """lstat of a directory's entry, or None if it has gone since it was listed."""
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None


def find_regular(root: beneath.Root, path: str) -> StoredFile | None:
    """The regular file `path` beneath `root`, or None if nothing has that name.

    Raises BrokenChainError for anything else of that name (a symlink is not followed).
    """
    try:
        status = beneath.stat_beneath(root, path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BrokenChainError(f"{path}: {error.strerror}") from error
    if stat.S_ISREG(status.st_mode):
        return StoredFile(path, FileKey.of(status))
    raise BrokenChainError(f"{path}: is not a regular file; nothing else is followed or read")


def with_seal(root: beneath.Root, file: StoredFile) -> StoredFile:
    """The layer `file` together with what stands in its seal's place, whatever that is."""
    try:
        status = beneath.stat_beneath(root, file.path + SEAL_SUFFIX)
    except OSError as error:
        if error.errno in ABSENT:
            return file
        raise BrokenChainError(f"{file.path}{SEAL_SUFFIX}: {error.strerror}") from error
    return file._replace(seal=FileKey.of(status))


def load_document(root: beneath.Root, path: str) -> dict[str, Any]:
    """The JSON object in the file `path` beneath `root`; writing it again gives valid JSON.

    Raises BrokenChainError, in one line, for a file over 1 MiB or one that changes while it is
    read, for what is not UTF-8 or not JSON, for NaN and numbers that do not fit (more than 1,000
    digits, a float beyond its range), a duplicate key, half of a surrogate pair, nesting of more
    than 64, and anything but an object.
    """
    text = _read_document(root, path)
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


def _read_document(root: beneath.Root, path: str) -> bytes:
    try:
        fd = beneath.open_regular(root, path)
        with open(fd, "rb") as file:
            before = FileKey.of(os.fstat(fd))
            text = file.read(MAX_DOCUMENT + 1)
            after = FileKey.of(os.fstat(fd))
    except OSError as error:
        raise BrokenChainError(f"{path}: {error.strerror}") from error
    if len(text) > MAX_DOCUMENT:
        raise BrokenChainError(f"{path}: over {MAX_DOCUMENT} bytes, too large for a snapshot.json")
    if before != after:
        raise BrokenChainError(f"{path}: changed while it was read; try again")
    return text


def _is_nested_too_deep(document: dict[str, Any]) -> bool:
    # What json.loads can just take json.dumps cannot always write again.
    level: list[Any] = [document]
    for _ in range(_MAX_NESTING):
        inner = [v for outer in level for v in (outer.values() if type(outer) is dict else outer)]
        level = [value for value in inner if isinstance(value, (dict, list))]
    return bool(level)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _whole_number(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits, at most {_MAX_DIGITS} are taken")
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
            raise ValueError(f"the key {name[:_SHOWN]!r} stands twice")
        document[name] = value
    return document
