"""Directories of snapshots to test with: forkd stores and numbered layers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffmergefs.fuse.nodes import Node
from diffmergefs.fuse.tree import Tree
from tests.support.images import PAGE, signed, write_layer

#: The logical size of the layers, if nothing else is said.
SIZE = 16 * PAGE
#: The mtime of all files made here, if nothing else is said: long past.
OLD_NS = 1_600_000_000_000_000_000
SECOND_NS = 1_000_000_000

#: A base that is data but for its last page.
BASE_PAGES = range(15)


def pages(layer: int, numbers: Iterable[int]) -> list[tuple[int, bytes]]:
    """The extents of these pages, signed as this layer's (see `signed`)."""
    return [(number * PAGE, signed(layer, number * PAGE, PAGE)) for number in numbers]


def age(*paths: Path, mtime_ns: int = OLD_NS) -> None:
    """Give the files this mtime."""
    for path in paths:
        os.utime(path, ns=(mtime_ns, mtime_ns), follow_symlinks=False)


def write_tag(
    store: Path,
    tag: str,
    parent: str | None = None,
    *,
    layer: int = 0,
    numbers: Iterable[int] | None = None,
    size: int = SIZE,
    memory: str = "memory.bin",
    vmstate: str | None = "vmstate",
    **fields: Any,
) -> Path:
    """A tag of a forkd store: its memory file, vmstate and snapshot.json; its directory.

    The memory file is a base, or the diff of one page if it has a parent; `numbers` says which
    pages it holds. `fields` are further ones of the document; None leaves one out.
    """
    folder = store / tag
    folder.mkdir(parents=True, exist_ok=True)
    if numbers is None:
        numbers = BASE_PAGES if parent is None else [layer % 16]
    files = [write_layer(folder / memory, size, pages(layer, numbers))]
    document: dict[str, Any] = {"memory": str(folder / memory), "parent_tag": parent}
    if vmstate is not None:
        files.append(folder / vmstate)
        files[-1].write_bytes(b"state of " + os.fsencode(tag))
        document["vmstate"] = str(folder / vmstate)
    document = {k: v for k, v in (document | fields).items() if v is not None}
    age(*files)
    write_document(store, tag, json.dumps(document))
    return folder


def write_document(store: Path, tag: str, text: str | bytes) -> Path:
    """Write a tag's snapshot.json with just this text."""
    path = store / tag / "snapshot.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    age(path)
    return path


def write_chain(store: Path, tags: Sequence[str]) -> Path:
    """A forkd store with a chain of these tags, base first: layer n holds its page n too."""
    for n, tag in enumerate(tags):
        write_tag(store, tag, tags[n - 1] if n else None, layer=n)
    return store


def write_numbered(
    directory: Path, names: Sequence[str], size: int = SIZE, companions: Sequence[str] = ()
) -> Path:
    """Numbered layers of these names, the first a base; each diff n holds page n only.

    `companions` are further, small files. All are old.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        age(write_layer(directory / name, size, pages(n, [n % 16] if n else BASE_PAGES)))
    for name in companions:
        (directory / name).write_text(f"beside {name}", encoding="utf-8")
        age(directory / name)
    return directory


def opened_beneath(directory: Path) -> set[str]:
    """The files beneath the directory that this process has open, by path."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own descriptor
        if path.startswith(f"{directory}/") and not os.path.isdir(path):
            found.add(path)
    return found


def children(tree: Tree, folder: Node) -> dict[str, Node]:
    """The entries of a directory of the tree by name, as a client that lists it gets them."""
    names = tree.names(folder)
    entries = zip(names, tree.entries(folder, names), strict=True)
    return {os.fsdecode(name): entry[0] for name, entry in entries if entry is not None}
