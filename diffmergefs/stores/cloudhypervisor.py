"""Cloud Hypervisor's snapshots: directories with `memory-ranges`, `state.json`, `config.json`.

Cloud Hypervisor writes complete images only; since 2026 it leaves holes where memory is zero. A
directory that also has a `snapshot.json` (as in a forkd store) with a `parent_tag` holds a diff
instead. So without that document an image with holes may be either.

`memory-ranges` holds ranges of guest memory one after another, in the order of the table that the
memory manager keeps in the `state.json` beside it (MemoryManagerSnapshotData.memory_ranges in Cloud
Hypervisor's vmm/src/memory_manager.rs). That order is not fixed, so images of one chain belong
together only if their tables are equal.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffmergefs.core.beneath import Root
from diffmergefs.core.errors import BrokenChainError
from diffmergefs.core.failures import failures
from diffmergefs.stores.document import describe, describe_undocumented
from diffmergefs.stores.reader import FolderReader, Source, has_file
from diffmergefs.stores.snapshot import (
    DOCUMENT,
    Snapshot,
    key_of,
    load_document,
    parse_document,
)

MEMORY = "memory-ranges"
STATE = "state.json"
MAX_STATE = 64 << 20

_MAX_RANGES = 1 << 16
_MAX_PARTS = _MAX_RANGES * 8  # a range takes five, and the document holds more than the table
_MAX_ADDRESS = 1 << 64
_SHOWN = 4  # the number of ranges of a table in a message

Table = tuple[tuple[int, int], ...]


class CloudHypervisorReader(FolderReader):
    """Directories with a `memory-ranges`."""

    name = "cloud-hypervisor"
    marks = f"TAG/{MEMORY}"
    documents = (DOCUMENT,)
    device_state = (STATE, "config.json")

    def is_tag(self, root: Root, name: str) -> bool:
        return has_file(root, f"{name}/{MEMORY}")

    def describe(self, source: Source, tag: str, seen: Snapshot) -> Snapshot:
        root = source.root
        if has_file(root, f"{tag}/{DOCUMENT}"):
            return with_ranges(root, describe(root, seen, source.paths))
        return with_ranges(root, describe_undocumented(root, seen, MEMORY))

    def require_mergeable(self, base: str, diffs: Sequence[str]) -> None:
        """Raise BrokenChainError if a file named `memory-ranges` does not fit the others.

        Their tables must be equal. One of them is a diff only if a `snapshot.json` beside it names
        a parent: Cloud Hypervisor itself writes complete images, whose holes over a base would
        show the base's bytes.
        """
        if _is_image(base) and _names_parent(base):
            raise BrokenChainError(
                f"{base}: is a diff: the {DOCUMENT} beside it has a parent_tag; give its parent"
                " with --base, and this one with --diff"
            )
        if not diffs:
            return
        table = _explicit_table(base)
        for diff in diffs:
            require_equal_ranges(base, table, diff, _explicit_table(diff))
            if table is not None and not _names_parent(diff):
                raise BrokenChainError(
                    f"{diff}: Cloud Hypervisor writes complete images, whose holes are zeros; as a"
                    " diff they would show the base. Give it as a base, or, if it is a diff, say so"
                    f" with a parent_tag in a {DOCUMENT} beside it"
                )


def with_ranges(root: Root, found: Snapshot) -> Snapshot:
    """The snapshot with the table of its image, if the image is a `memory-ranges`.

    A table that cannot be read or does not fit the image's size becomes the snapshot's problem.
    """
    memory = found.memory
    if memory is None or os.path.basename(memory.path) != MEMORY:
        return found
    try:
        path = os.path.join(os.path.dirname(memory.path), STATE)
        if path not in found.device_state and (key := key_of(root, path)):
            found = replace(found, documents={**found.documents, path: key})
        table = read_table(root, memory.path, memory.key.size)
    except BrokenChainError as error:
        return found if found.problem else replace(found, problem=str(error))
    return replace(found, ranges=table)


def read_table(root: Root | None, memory: str, size: int) -> Table:
    """The table of the image `memory` of `size` bytes: (guest address, length) in file order.

    It is read from the `state.json` beside the image, beneath `root` if given. Raises
    BrokenChainError if there is none, if it is malformed, or if its lengths do not add up to the
    size.
    """
    path = os.path.join(os.path.dirname(memory), STATE)
    parts = _member(load_document(root, path, MAX_STATE, _MAX_PARTS), "snapshots", path)
    state = _member(_member(parts, "memory-manager", path), "snapshot_data", path).get("state")
    if not isinstance(state, str):
        raise BrokenChainError(
            f"{path}: the memory manager's state is not text; snapshots of Cloud Hypervisor before"
            " 40.0 cannot be read; take it again with a newer version"
        )
    within = f"{path}: the memory manager's state"
    manager = parse_document(state.encode("utf-8", "surrogatepass"), within, _MAX_PARTS)
    listed = _member(manager, "memory_ranges", within).get("data")
    if not isinstance(listed, list) or not 0 < len(listed) <= _MAX_RANGES:
        raise BrokenChainError(f"{within}: has no table of 1 to {_MAX_RANGES} memory ranges")
    table = tuple(_range(entry, within) for entry in listed)
    _require_apart(table, within)
    total = sum(length for _, length in table)
    if total != size:
        raise BrokenChainError(
            f"{memory}: has {size} bytes, but the memory ranges in its {STATE} have {total}; they"
            " do not belong together"
        )
    return table


def _member(outer: Mapping[str, Any], name: str, path: str) -> dict[str, Any]:
    inner = outer.get(name)
    if not isinstance(inner, dict):
        raise BrokenChainError(
            f"{path}: no object '{name}'; is it a state.json of Cloud Hypervisor?"
        )
    return inner


def _range(entry: object, path: str) -> tuple[int, int]:
    address = entry.get("gpa") if isinstance(entry, dict) else None
    length = entry.get("length") if isinstance(entry, dict) else None
    # To Python a bool is an int, but it is neither an address nor a length.
    if type(address) is not int or type(length) is not int:
        raise BrokenChainError(f"{path}: a memory range is not of the form gpa, length")
    if not (0 <= address < _MAX_ADDRESS and 0 < length <= _MAX_ADDRESS - address):
        raise BrokenChainError(f"{path}: a memory range of {length} bytes at {address}")
    return address, length


def _require_apart(table: Table, path: str) -> None:
    end = 0
    for address, length in sorted(table):
        if address < end:
            raise BrokenChainError(f"{path}: memory ranges overlap at {address:#x}")
        end = address + length


def require_equal_ranges(base: str, table: Table | None, path: str, other: Table | None) -> None:
    """Raise BrokenChainError unless the images `base` and `path` have equal tables or both none.

    A file that is not a `memory-ranges` has none.
    """
    if table != other:
        raise BrokenChainError(
            f"{path}: {_shown(other)}, but its base {base}: {_shown(table)}; images merge only"
            " if both tables are equal; take both snapshots of one VM with the same memory"
        )


def _shown(table: Table | None) -> str:
    if table is None:
        return "no Cloud Hypervisor memory ranges"
    more = f" and {len(table) - _SHOWN} more" if len(table) > _SHOWN else ""
    listed = ", ".join(f"{length:#x}@{address:#x}" for address, length in table[:_SHOWN])
    return f"memory ranges {listed}{more}"


def _is_image(path: str) -> bool:
    return os.path.basename(os.path.realpath(path)) == MEMORY


def _explicit_table(path: str) -> Table | None:
    if not _is_image(path):
        return None
    real = os.path.realpath(path)
    with failures(path):
        size = os.stat(real).st_size
    return read_table(None, real, size)


def _names_parent(path: str) -> bool:
    document = os.path.join(os.path.dirname(os.path.realpath(path)), DOCUMENT)
    return os.path.lexists(document) and bool(load_document(None, document).get("parent_tag"))
