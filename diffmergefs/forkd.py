"""forkd's store: one directory a tag, described by its snapshot.json (also our native form)."""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffmergefs import beneath
from diffmergefs.beneath import Reach, Root
from diffmergefs.errors import BrokenChainError, DiffMergeError
from diffmergefs.layer import FileKey
from diffmergefs.snapshot import (
    Snapshot,
    StoredFile,
    find_regular,
    is_left_out,
    load_document,
    status_of,
    with_seal,
)

DOCUMENT = "snapshot.json"
_LEGAL_TAG = re.compile(r"[A-Za-z0-9_-](?:[A-Za-z0-9_.+-]{0,62}[A-Za-z0-9_-])?")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_MAX_PATH = 4096  # PATH_MAX of Linux
_OUTSIDE = "; name the directory that it lies in with --allow-outside DIR if it belongs there"


def is_tag(root: Root, name: str) -> bool:
    """Whether the directory `name` beneath `root` holds a snapshot, complete or not.

    Raises OSError where that cannot be told.
    """
    if is_left_out(name):
        return False
    return _exists(root, f"{name}/{DOCUMENT}") or (
        _exists(root, f"{name}/memory.bin") and _exists(root, f"{name}/vmstate")
    )


def read(root_path: str, root: Root, kinds: Mapping[str, int]) -> dict[str, Snapshot]:
    """The snapshots in the directories among `kinds` (name -> file type), by tag.

    A directory that cannot be looked into counts as one, which is broken. A file that a document
    records outside `root_path` is found if `root` allows its directory.
    """
    roots = {os.path.abspath(root_path), os.path.realpath(root_path)}
    folders = [name for name, kind in kinds.items() if kind == stat.S_IFDIR]
    found = {name: _read_folder(root, name, roots) for name in folders}
    return {name: snapshot for name, snapshot in found.items() if snapshot}


def _read_folder(root: Root, name: str, roots: set[str]) -> Snapshot | None:
    try:
        return _read_tag(root, name, roots) if is_tag(root, name) else None
    except OSError as error:
        return Snapshot(name, problem=f"{name}: {error.strerror}")


def _read_tag(root: Root, tag: str, roots: set[str]) -> Snapshot:
    state = _files(root, tag)
    newest = max((key.mtime_ns for _, key in state), default=0)
    seen: dict[str, Any] = {"newest_ns": newest, "state": state}
    try:
        found = _describe(root, tag, roots, seen)
    except DiffMergeError as error:
        found = Snapshot(tag, problem=str(error), **seen)
    if _LEGAL_TAG.fullmatch(tag):
        return found
    problem = f"{tag!r} is no legal tag (1 to 64 of letters, digits, - and _, . and + inside)"
    return replace(found, problem=problem)


def _describe(root: Root, tag: str, roots: set[str], seen: Mapping[str, Any]) -> Snapshot:
    if not _exists(root, f"{tag}/{DOCUMENT}"):
        memory = find_regular(root, f"{tag}/memory.bin")
        return Snapshot(tag, None, memory and with_seal(root, memory), tag, **seen)
    path = f"{tag}/{DOCUMENT}"
    document = load_document(root, path)
    found = Snapshot(tag, _parent_if_stated(document, path), folder=tag, **seen)
    try:
        recorded = _text(document, "memory", path)
        if recorded is None:
            raise BrokenChainError(f"{path}: 'memory' is missing")
        memory = with_seal(root, _locate(root, tag, recorded, roots))
        found = replace(found, memory=memory, **_with_file(seen, memory))
        return _describe_rest(root, tag, roots, found, document)
    except BrokenChainError as error:
        # What is known stays known: its parent, and its layer, which is so nowhere passed through.
        return replace(found, problem=str(error))


def _parent_if_stated(document: Mapping[str, Any], path: str) -> str | None:
    try:
        return _text(document, "parent_tag", path)
    except BrokenChainError:
        return None  # _describe_rest tells why


def _describe_rest(
    root: Root, tag: str, roots: set[str], found: Snapshot, document: Mapping[str, Any]
) -> Snapshot:
    path, memory = f"{tag}/{DOCUMENT}", found.layer
    parent = _text(document, "parent_tag", path)
    parent_hash = _text(document, "parent_content_hash", path)
    if parent_hash is not None and not _SHA256.fullmatch(parent_hash):
        raise BrokenChainError(f"{path}: parent_content_hash is no hex sha256 of 64 digits")
    if parent_hash is not None and parent is None:
        raise BrokenChainError(f"{path}: parent_content_hash without a parent_tag")
    files = {}
    seen: dict[str, Any] = {"newest_ns": found.newest_ns, "state": found.state}
    taken = [DOCUMENT, os.path.basename(memory.path)]
    if (state_path := _text(document, "vmstate", path)) is not None:
        vmstate = _locate(root, tag, state_path, roots)
        taken.append(os.path.basename(vmstate.path))
        files[taken[-1]] = vmstate.path
        seen = _with_file(seen, vmstate)
    _require_distinct(path, taken)
    return replace(
        found,
        parent=parent,
        files=files,
        document=document,
        vmstate=next(iter(files), None),
        parent_hash=parent_hash.lower() if parent_hash else None,
        **seen,
    )


def _require_distinct(path: str, names: list[str]) -> None:
    # In a view all of them stand in one directory.
    what = (f"its own {DOCUMENT}", "'memory'", "'vmstate'")
    for one, other in itertools.combinations(range(len(names)), 2):
        if names[one] == names[other]:
            raise BrokenChainError(
                f"{path}: {what[one]} and {what[other]} have one name, {names[one]!r}"
            )


def _with_file(seen: Mapping[str, Any], file: StoredFile) -> dict[str, Any]:
    # A file may lie outside the tag's directory: it belongs to what must stand still all the same.
    return {
        "newest_ns": max(seen["newest_ns"], file.key.mtime_ns),
        "state": seen["state"] | {(file.path, file.key), (file.path, file.seal)},
    }


def _locate(root: Root, tag: str, recorded: str, roots: set[str]) -> StoredFile:
    # Recorded paths are often absolute and stale after a move of the store. In this order: the
    # basename in the tag's own directory; the rest of a path that lies beneath the root, or else
    # the path itself where the user allows its directory; nothing.
    name = os.path.basename(recorded)
    if not name or ".." in recorded.split("/") or "\0" in recorded:
        raise BrokenChainError(f"{tag}/{DOCUMENT}: {recorded!r} names no file beneath the store")
    own = find_regular(root, f"{tag}/{name}")
    path = _beneath(f"{tag}/{recorded}" if not recorded.startswith("/") else recorded, roots)
    is_outside = path.startswith("/")
    is_allowed = isinstance(root, Reach) and root.allowed(path) is not None
    recorded_file = None if is_outside and not is_allowed else find_regular(root, path)
    if own and recorded_file and own.key[:2] != recorded_file.key[:2]:
        raise BrokenChainError(
            f"{tag}/{DOCUMENT}: {recorded!r} may be {own.path} or {recorded_file.path}, two"
            " different files; remove one or correct the path"
        )
    found = own or recorded_file
    if found is None:
        raise BrokenChainError(
            f"{tag}/{DOCUMENT}: the recorded file {recorded!r} is neither in '{tag}' nor at that"
            " path beneath the store" + (_OUTSIDE if is_outside else "")
        )
    return found


def _beneath(path: str, roots: set[str]) -> str:
    # Relative to the store; absolute where it lies outside.
    if not path.startswith("/"):
        return os.path.normpath(path)
    path = os.path.normpath(f"/{path.lstrip('/')}")  # POSIX lets a path keep two leading slashes
    for root in roots:
        if path.startswith(root.rstrip("/") + "/"):
            return path[len(root.rstrip("/")) + 1 :]
    return path


def _text(document: Mapping[str, Any], name: str, path: str) -> str | None:
    value = document.get(name)
    if value is not None and not isinstance(value, str):
        raise BrokenChainError(f"{path}: '{name}' is a {type(value).__name__}, not a string")
    if value is not None and len(value) > _MAX_PATH:
        raise BrokenChainError(
            f"{path}: '{name}' has {len(value)} characters, a path has at most {_MAX_PATH}"
        )
    try:
        os.fsencode(value or "")
    except UnicodeEncodeError:
        raise BrokenChainError(f"{path}: '{name}' is {value!a}, which is no text") from None
    return value


def _exists(root: Root, path: str) -> bool:
    # Any other failure is no answer: a diff whose document cannot be seen must not become a base.
    try:
        beneath.stat_beneath(root, path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _files(root: Root, tag: str) -> frozenset[tuple[str, FileKey]]:
    fd = beneath.open_directory(root, tag)
    try:
        with os.scandir(fd) as entries:
            found = [(f"{tag}/{entry.name}", status_of(entry)) for entry in entries]
            return frozenset((path, FileKey.of(status)) for path, status in found if status)
    finally:
        os.close(fd)
