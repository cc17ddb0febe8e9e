"""Random input for everything that reads what others wrote: refusals, no surprise, no way out.

The counts are those of `make soak`: 100,000 inputs in all. `make test` runs a small share.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmergefs.core.beneath import AllowedRoots
from diffmergefs.core.errors import (
    BrokenChainError,
    DiffMergeError,
    SealError,
    SizeMismatchError,
)
from diffmergefs.core.layer import MAX_SIZE
from diffmergefs.fuse.nodes import Attributes, MemoryFile, Node, Passed, TagFolder
from diffmergefs.fuse.nodes import Document as DocumentNode
from diffmergefs.fuse.passthrough import rewritten
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.images import open_snapshot
from diffmergefs.opening.opener import LayerPool
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars import bmap, bmapreader
from diffmergefs.stores.catalog import LAYOUTS, Catalog, read_catalog
from tests.support import trees
from tests.support.fuzzing import (
    SECRET_LAYER,
    FilledDiff,
    Guard,
    ground,
    inputs,
    require_one_line,
)
from tests.support.images import PAGE, write_layer
from tests.support.maps import block_maps
from tests.support.stores import SIZE, children, write_tag

__all__ = ["ground"]

# What a catalog says of a tag that cannot be shown.
REFUSALS = (BrokenChainError, SizeMismatchError)


def strict(text: bytes) -> Any:
    """JSON without the liberties that Python's parser takes."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text.decode("utf-8"), parse_constant=refuse)


KNOWN = {"memory", "vmstate", "parent_tag", "parent_content_hash", "volumes", "rootfs"}


@pytest.mark.parametrize(
    ("drawn", "full"),
    [
        (trees.documents.map(lambda value: json.dumps(value).encode()), 20_000),
        (trees.texts, 20_000),
        (st.binary(max_size=200), 5_000),
    ],
    ids=["values", "mutations", "bytes"],
)
def test_documents(
    drawn: st.SearchStrategy[bytes],
    full: int,
    soak: bool,
    seen: Callable[..., None],
    ground: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random documents in the place of a tag's snapshot.json"""
    store = ground / "store"
    for tag in ("a", "b", "c", "d", "t"):
        write_tag(store, tag)
    (store / "shared").mkdir()
    write_layer(store / "shared" / "big.mem", SIZE, [])
    path = store / "t" / "snapshot.json"
    places = {trees.STORE: str(store), trees.OUTSIDE: str(ground / "outside")}
    guard = Guard([store], monkeypatch)
    met = {"inputs": 0, "complete": 0, "broken": 0}

    @inputs(full, soak)
    @given(text=drawn)
    def check(text: bytes) -> None:
        met["inputs"] += 1
        path.write_bytes(trees.placed(text, places))
        with guard.on_duty():
            catalog = read_catalog(str(store))
            try:
                links = catalog.chain("t")
            except REFUSALS as error:
                require_one_line(error)
                met["broken"] += 1
                return
        met["complete"] += 1
        kept, whole = links[-1].document, strict(path.read_bytes())
        assert kept == {name: value for name, value in whole.items() if name in KNOWN}
        assert links[-1].layer.path in {"t/memory.bin", "t/vmstate", "shared/big.mem"}
        assert [link.tag for link in links[:-1]] in ([], ["a"], ["b"], ["c"], ["d"])
        assert all(catalog.chain(tag) for tag in "abcd")
        document = strict(rewritten(links[-1], "/view"))
        assert document["memory"] == f"/view/t/{os.path.basename(links[-1].layer.path)}"
        assert not document.keys() & {"parent_tag", "parent_content_hash"}

    check()
    seen(**met, opens_watched=guard.opened)
    assert guard.opened > met["broken"]


@pytest.mark.parametrize(
    ("allowed", "full"), [(False, 20_000), (True, 10_000)], ids=["plain", "allow-outside"]
)
def test_directories(
    allowed: bool,
    full: int,
    soak: bool,
    seen: Callable[..., None],
    ground: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random directories of snapshots, looked over, opened, read and shown"""
    numbers = itertools.count()
    outside = ground / "outside"
    roots = [ground / "store", *([outside] if allowed else [])]
    guard = Guard(roots, monkeypatch)
    # Nothing is hashed or remembered: that is none of a directory's business.
    policy = TrustPolicy(verify="no", allow_outside=(str(outside),) if allowed else ())
    secret = (outside / "secret").stat().st_ino
    met = {"inputs": 0, "refused": 0, "broken": 0, "unopened": 0, "views": 0}

    @inputs(full, soak)
    @given(
        contents=trees.layouts,
        layout=st.sampled_from([None, None, *LAYOUTS]),
        suffix=st.sampled_from([None, None, None, "mem", ".bmap", ".img"]),
    )
    def check(contents: Mapping[str, Any], layout: str | None, suffix: str | None) -> None:
        met["inputs"] += 1
        # A new directory each time: the Guard's root is its parent.
        store = ground / "store" / str(next(numbers))
        places = {trees.STORE: str(store), trees.OUTSIDE: str(outside)}
        made = trees.Made({secret: trees.signed_pages(SECRET_LAYER, range(4))})
        trees.make(store, contents, places, made)
        try:
            with guard.on_duty():
                examine(store, layout, suffix, made)
        finally:
            shutil.rmtree(store)

    def examine(store: Path, layout: str | None, suffix: str | None, made: trees.Made) -> None:
        try:
            catalog = read_catalog(str(store), layout, suffix, options=policy)
        except DiffMergeError as error:
            require_one_line(error)
            met["refused"] += 1
            return
        root = os.open(store, os.O_PATH | os.O_DIRECTORY)
        try:
            pool = LayerPool(AllowedRoots(root, policy.allow_outside), policy)
            for tag in catalog.snapshots:
                examine_tag(catalog, tag, pool, made)
        finally:
            os.close(root)
        examine_mount(store, layout, suffix, made)

    def examine_tag(catalog: Catalog, tag: str, pool: LayerPool, made: trees.Made) -> None:
        try:
            links = catalog.chain(tag)
        except REFUSALS as error:
            require_one_line(error)
            met["broken"] += 1
            return
        assert links[-1].tag == tag and links[0].parent is None
        assert [link.parent for link in links[1:]] == [link.tag for link in links[:-1]]
        sizes = {link.layer.key.size for link in links}
        assert len(sizes) == 1 and 0 < max(sizes) <= MAX_SIZE
        inodes = [link.layer.key.inode for link in links]
        assert secret not in inodes or allowed or os.path.exists(hard_link(catalog, links))
        try:
            image = open_snapshot(links, pool, policy)
        except DiffMergeError as error:
            require_one_line(error)
            met["unopened"] += 1
            return
        met["views"] += 1
        for page in range(min(5, math.ceil(image.view.size / PAGE))):
            found = bytes(image.view.read(page * PAGE, PAGE))
            assert found == made.page(inodes, page)[: len(found)]

    def hard_link(catalog: Catalog, links: Any) -> str:
        # The secret may be linked into the store: then it is the store's as well.
        return next(
            f"{catalog.root}/{link.layer.path}" for link in links if link.layer.key.inode == secret
        )

    def examine_mount(
        store: Path, layout: str | None, suffix: str | None, made: trees.Made
    ) -> None:
        shown = Store(str(store), policy, layout=layout, suffix=suffix, clock=lambda: 1 << 62)
        try:
            assert shown.look() == set()
            for tag in shown.tags():
                try:
                    shown.open(tag)
                except DiffMergeError as error:
                    require_one_line(error)
            tree = Tree("/view", shown)
            walk(tree, tree.inodes.node(1), made)
        finally:
            shown.close()

    def walk(tree: Tree, folder: Node, made: trees.Made) -> None:
        for name, node in children(tree, folder).items():
            assert name not in ("", ".", "..") and "/" not in name
            attributes = tree.attributes(node)
            assert isinstance(attributes, Attributes)
            match node:
                case Passed(kind=stat.S_IFREG):
                    fd = tree.passthrough.open(node)
                    assert os.fstat(fd).st_ino not in hidden(tree)
                    os.close(fd)
                case Passed(kind=stat.S_IFLNK):
                    assert tree.passthrough.link_target(node)
                case DocumentNode():
                    strict(tree.passthrough.content(node))
                case TagFolder() | Passed(kind=stat.S_IFDIR):
                    walk(tree, node, made)
                case MemoryFile(image):
                    assert attributes.size == image.view.size
                case _:
                    raise AssertionError(f"{name!r}: {node}")

    def hidden(tree: Tree) -> set[int]:
        assert tree.store is not None
        chains = [tree.store.chain(tag) or [] for tag in tree.store.tags()]
        return {link.layer.key.inode for links in chains for link in links}

    (ground / "store").mkdir()
    check()
    seen(**met, opens_watched=guard.opened)
    assert all(met.values()), met


@pytest.mark.parametrize(
    ("drawn", "full"),
    [(block_maps(FilledDiff.CONTENT), 20_000), (st.binary(max_size=200), 5_000)],
    ids=["maps", "bytes"],
)
def test_block_maps(
    drawn: st.SearchStrategy[bytes],
    full: int,
    soak: bool,
    seen: Callable[..., None],
    ground: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random block maps as the seal of a diff"""

    def parse(text: bytes) -> list[tuple[int, int]]:
        found = bmapreader.parse(text, "diff.bmap")
        assert found.size > 0 and found.block.bit_count() == 1
        ranges = [(start, stop) for start, stop, _ in found.ranges()]
        borders = [border for extent in ranges for border in extent]
        assert borders == sorted(borders) and all(0 <= b <= found.size for b in borders)
        assert all(start < stop for start, stop in ranges)
        assert bmapreader.parse(bmap.dump(found)) == found
        return ranges

    filled = FilledDiff(ground / "layers", ".bmap", parse, SealError, monkeypatch)

    @inputs(full, soak)
    @given(text=drawn)
    def check(text: bytes) -> None:
        filled.examine(text)

    check()
    seen(**filled.met)
    assert full == 5_000 or all(filled.met.values()), filled.met


def test_the_guard_lets_nothing_pass(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = ground / "outside"
    os.mkfifo(inside / "fifo")
    (inside / "link").symlink_to("../outside-2/secret")
    guard = Guard([inside], monkeypatch)
    descriptor = os.open(inside, os.O_RDONLY)

    def refused(call: Callable[[], Any], why: str) -> None:
        with pytest.raises(AssertionError, match=why), guard.on_duty():
            call()

    with guard.on_duty():
        os.close(os.open(inside / "secret", os.O_RDONLY | os.O_NONBLOCK))
        os.close(os.open("secret", os.O_PATH, dir_fd=descriptor))
        os.listdir(descriptor)
    refused(lambda: os.open(inside / "link", os.O_RDONLY | os.O_NONBLOCK), "outside-2/secret, out")
    refused(lambda: os.open("../outside-2", os.O_PATH, dir_fd=descriptor), "outside-2, outside")
    refused(lambda: os.open(inside / "fifo", os.O_RDONLY | os.O_NONBLOCK), "no file, and was")
    refused(lambda: os.open(inside / "fifo", os.O_RDONLY), "would wait")
    refused(lambda: os.open(inside / "secret", os.O_RDWR | os.O_NONBLOCK), "for writing")
    refused(lambda: (inside / "secret").read_bytes(), "not by os.open")
    refused(lambda: os.listdir(inside), "listed by its name")
    refused(lambda: os.remove(inside / "secret"), "os.remove")
    assert guard.opened == 5
    os.close(descriptor)
