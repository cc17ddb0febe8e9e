"""What is known of one snapshot by metadata alone."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from diffmergefs import beneath
from diffmergefs.errors import BrokenChainError
from diffmergefs.layer import FileKey

MAX_DOCUMENT = 1 << 20
_MAX_NESTING = 64
_STAGING_SUFFIXES = (".tmp", ".part", ".partial", ".swp")


class StoredFile(NamedTuple):
    """A file beneath the directory of snapshots: its relative path and which content it has."""

    path: str
    key: FileKey


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


def find_regular(root: int, path: str) -> StoredFile | None:
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


def load_document(root: int, path: str) -> Mapping[str, Any]:
    """The JSON object in the file `path` beneath `root`.

    Raises BrokenChainError, in one line, for a file over 1 MiB, invalid JSON, NaN, a duplicate
    key, deep nesting, and anything but an object.
    """
    try:
        fd = beneath.open_regular(root, path)
        with open(fd, "rb") as file:
            text = file.read(MAX_DOCUMENT + 1)
    except OSError as error:
        raise BrokenChainError(f"{path}: {error.strerror}") from error
    if len(text) > MAX_DOCUMENT:
        raise BrokenChainError(f"{path}: over {MAX_DOCUMENT} bytes, too large for a snapshot.json")
    try:
        document = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BrokenChainError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise BrokenChainError(f"{path}: holds a {type(document).__name__}, not a JSON object")
    if _is_nested_too_deep(document):
        raise BrokenChainError(f"{path}: nested more than {_MAX_NESTING} deep")
    return document


def _is_nested_too_deep(document: dict[str, Any]) -> bool:
    # What json.loads can just take json.dumps cannot always write again.
    level: list[Any] = [document]
    for _ in range(_MAX_NESTING):
        inner = [v for outer in level for v in (outer.values() if type(outer) is dict else outer)]
        level = [value for value in inner if isinstance(value, (dict, list))]
    return bool(level)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return document
