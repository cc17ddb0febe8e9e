"""A served store as a tree, without a mount."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffmergefs.fuse.nodes import Document, Root, TagFolder
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.trust import TrustPolicy
from tests.support.stores import OLD_NS, SECOND_NS, write_chain

MOUNTPOINT = "/mnt/the views"


@pytest.fixture
def root(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "work"])


def tree_of(root: Path, *, open_rw: bool = False) -> Tree:
    store = Store(str(root), TrustPolicy(), clock=lambda: OLD_NS + 100 * SECOND_NS)
    store.look()
    store.look()  # by this look the new files have settled
    return Tree(MOUNTPOINT, store, open_rw=open_rw)


def folder_of(tree: Tree, tag: str) -> TagFolder:
    node = tree.child(Root(), tag)
    assert isinstance(node, TagFolder)
    return node


def document(tree: Tree, tag: str) -> dict[str, object]:
    node = tree.child(folder_of(tree, tag), "snapshot.json")
    assert isinstance(node, Document)
    found: dict[str, object] = json.loads(tree.passthrough.content(node))
    return found
