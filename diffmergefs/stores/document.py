"""A snapshot's `snapshot.json`: its memory, its parent, its parent's hash, its other files."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import weakref
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from diffmergefs.core.beneath import AllowedRoots, Root
from diffmergefs.core.errors import BrokenChainError
from diffmergefs.stores.snapshot import (
    DOCUMENT,
    MAX_DOCUMENT,
    Snapshot,
    StoredFile,
    find_layer,
    find_regular,
    parse_document,
    read_with_status,
    version_of,
    with_records,
)

MAX_PATH = 4096  # PATH_MAX of Linux
OUTSIDE = "; if it belongs outside the store, name its directory with --allow-outside DIR"
_FIELDS = ("memory", "vmstate", "parent_tag", "parent_content_hash", "volumes", "rootfs")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def describe(root: Root, seen: Snapshot, paths: Collection[str]) -> Snapshot:
    """The snapshot in the directory `seen.tag` beneath `root`, by the document in it.

    `seen` is what is known without it, and `paths` are the absolute paths of `root`. A broken
    snapshot keeps what is known of it: its parent, and its layer, so that no mount passes the layer
    through. Raises BrokenChainError if nothing more is known.
    """
    tag = seen.tag
    path = f"{tag}/{DOCUMENT}"
    text, status = read_with_status(root, path, MAX_DOCUMENT)
    document = _fields(text, path)
    seen = replace(seen, document_status=status)
    found = replace(seen, parent=_parent_if_stated(document, path))
    try:
        recorded = _text(document, "memory", path)
        if recorded is None:
            raise BrokenChainError(f"{path}: 'memory' is missing")
        memory = _locate(root, tag, recorded, paths)
        memory = with_records(root, memory, is_diff=found.parent is not None)
        found = replace(found, memory=memory)
        return _describe_rest(root, paths, found, document)
    except BrokenChainError as error:
        return replace(found, problem=str(error))


def describe_undocumented(root: Root, seen: Snapshot, name: str) -> Snapshot:
    """The snapshot in the directory `seen.tag` without a document, whose memory file is `name`.

    It has no parent, and is a base only if its memory has no hole.
    """
    doubt = (
        f"without a {DOCUMENT} nothing tells a base from a diff; wait for {seen.tag}/{DOCUMENT},"
        f' or, if it is a base, write {{"memory": "{name}"}} to it'
    )
    return replace(seen, memory=find_layer(root, f"{seen.tag}/{name}"), doubt=doubt)


class Fields(dict[str, Any]):
    """The known fields of a document. They are never changed."""

    __slots__ = ("__weakref__",)


# By the sha256 of the text. Equal documents (hard links, those of successive catalogs) are parsed
# and kept once, as long as a snapshot has them.
_kept: weakref.WeakValueDictionary[bytes, Fields] = weakref.WeakValueDictionary()


def _fields(text: bytes, path: str) -> Fields:
    digest = hashlib.sha256(text).digest()
    if (known := _kept.get(digest)) is not None:
        return known
    parsed = parse_document(text, path)
    fields = Fields((name, parsed[name]) for name in _FIELDS if name in parsed)
    return _kept.setdefault(digest, fields)


def _parent_if_stated(document: Mapping[str, Any], path: str) -> str | None:
    try:
        return _text(document, "parent_tag", path)
    except BrokenChainError:
        return None  # _describe_rest raises it again


def _describe_rest(
    root: Root, paths: Collection[str], found: Snapshot, document: Mapping[str, Any]
) -> Snapshot:
    path, memory = f"{found.tag}/{DOCUMENT}", found.layer
    parent = _text(document, "parent_tag", path)
    parent_hash = _text(document, "parent_content_hash", path)
    if parent_hash is not None and not _SHA256.fullmatch(parent_hash):
        raise BrokenChainError(f"{path}: parent_content_hash is not a hex sha256 of 64 digits")
    if parent_hash is not None and parent is None:
        raise BrokenChainError(f"{path}: parent_content_hash without a parent_tag")
    files = {}
    taken = [DOCUMENT, os.path.basename(memory.path)]
    if (state_path := _text(document, "vmstate", path)) is not None:
        vmstate = _locate(root, found.tag, state_path, paths)
        taken.append(os.path.basename(vmstate.path))
        files[taken[-1]] = vmstate.path
        version = version_of(root, vmstate.path)
        found = replace(found, device_state={**found.device_state, vmstate.path: version})
    _require_distinct(path, taken)
    return replace(
        found,
        parent=parent,
        files=files,
        document=document,
        vmstate=next(iter(files), None),
        parent_hash=parent_hash.lower() if parent_hash else None,
    )


def _require_distinct(path: str, names: list[str]) -> None:
    # In a mount all of them are in one directory.
    what = (f"its own {DOCUMENT}", "'memory'", "'vmstate'")
    for one, other in itertools.combinations(range(len(names)), 2):
        if names[one] == names[other]:
            raise BrokenChainError(
                f"{path}: {what[one]} and {what[other]} have the same name, {names[one]!r}"
            )


def _locate(root: Root, tag: str, recorded: str, paths: Collection[str]) -> StoredFile:
    # Recorded paths are often absolute, and stale after the store was moved. In this order: the
    # basename in the tag's own directory; the rest of a path beneath the root, or else the path
    # itself if the user allows its directory; nothing.
    name = os.path.basename(recorded)
    if not name or ".." in recorded.split("/") or "\0" in recorded:
        raise BrokenChainError(f"{tag}/{DOCUMENT}: {recorded!r} does not name a file in the store")
    own = find_regular(root, f"{tag}/{name}")
    path = beneath_source(f"{tag}/{recorded}" if not recorded.startswith("/") else recorded, paths)
    is_outside = path.startswith("/")
    recorded_file = None if not is_reachable(root, path) else find_regular(root, path)
    if own and recorded_file and own.key[:2] != recorded_file.key[:2]:
        raise BrokenChainError(
            f"{tag}/{DOCUMENT}: {recorded!r} may be {own.path} or {recorded_file.path}, two"
            " different files; remove one or correct the path"
        )
    found = own or recorded_file
    if found is None:
        raise BrokenChainError(
            f"{tag}/{DOCUMENT}: the recorded file {recorded!r} is neither in '{tag}' nor at that"
            " path beneath the store" + (OUTSIDE if is_outside else "")
        )
    return found


def is_reachable(root: Root, path: str) -> bool:
    """Whether a path from `beneath_source` is beneath `root`, or allowed by it."""
    return not path.startswith("/") or (
        isinstance(root, AllowedRoots) and root.allowed(path) is not None
    )


def beneath_source(path: str, paths: Collection[str]) -> str:
    """A recorded path relative to the source, whose absolute paths are `paths`; no file is read.

    A path outside the source stays absolute.
    """
    if not path.startswith("/"):
        return os.path.normpath(path)
    path = os.path.normpath(f"/{path.lstrip('/')}")  # POSIX lets a path keep two leading slashes
    for root in paths:
        if path.startswith(root.rstrip("/") + "/"):
            return path[len(root.rstrip("/")) + 1 :]
    return path


def _text(document: Mapping[str, Any], name: str, path: str) -> str | None:
    value = document.get(name)
    if value is not None and not isinstance(value, str):
        raise BrokenChainError(f"{path}: '{name}' is a {type(value).__name__}, not a string")
    if value is not None and len(value) > MAX_PATH:
        raise BrokenChainError(
            f"{path}: '{name}' has {len(value)} characters, a path has at most {MAX_PATH}"
        )
    try:
        os.fsencode(value or "")
    except UnicodeEncodeError:
        raise BrokenChainError(f"{path}: '{name}' is {value!a}, which is not text") from None
    return value
