"""Opening images for many clients at once: each layer and each image once, in its own threads."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from diffmergefs.core.errors import DenseDiffError, FileAccessError, PinError
from diffmergefs.core.layer import Layer
from diffmergefs.fuse.nodes import MemoryFile, OpenImage, Passed, Root, TagFolder
from diffmergefs.fuse.opener import ImageOpener
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.tree import Tree
from tests.support.images import overlay_oracle
from tests.support.stores import BASE_PAGES, SIZE, age, pages, write_chain, write_tag
from tests.support.subjects.tree import tree_of

LEAF = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2])])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_chain(tmp_path / "store", ["base", "work", "leaf"])


class Called:
    """Counts the calls of a method by its last argument, all of which wait for `go_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.counts: Counter[Any] = Counter()
        self.threads: set[int] = set()
        self.go_on = threading.Event()
        real = getattr(Store, name)

        def counted(store: Store, *arguments: Any) -> Any:
            self.counts[arguments[-1]] += 1
            self.threads.add(threading.get_ident())
            assert self.go_on.wait(60)
            return real(store, *arguments)

        monkeypatch.setattr(Store, name, counted)


def run(work: Callable[[ImageOpener], Awaitable[object]], tree: Tree) -> None:
    async def main() -> None:
        await work(ImageOpener(tree))

    trio.run(main)


async def folder(opener: ImageOpener, tag: str) -> TagFolder:
    node = await opener.child(Root(), tag)
    assert isinstance(node, TagFolder)
    return node


def test_clients_of_one_chain_share_its_layers_and_each_image(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tree_of(root)
    layers = Called(monkeypatch, "open_layer")
    opened: Counter[str] = Counter()
    open_layer = Layer.open

    def counted(path: str, *arguments: Any) -> Layer:
        opened[path] += 1
        return open_layer(path, *arguments)

    monkeypatch.setattr(Layer, "open", counted)
    found: list[OpenImage] = []

    async def ask(opener: ImageOpener, tag: str) -> None:
        found.append(await opener.image(tag))

    async def main(opener: ImageOpener) -> None:
        async with trio.open_nursery() as nursery:
            for tag in ["work", "leaf"] * 20:
                nursery.start_soon(ask, opener, tag)
            await trio.testing.wait_all_tasks_blocked(0.01)
            layers.go_on.set()

    run(main, tree)
    # Images compare by identity: there are two.
    assert {image.tag: found.count(image) for image in found} == {"work": 20, "leaf": 20}
    # A client that comes after the gate may ask for a layer again, but each file is opened once.
    assert opened == {f"{tag}/memory.bin": 1 for tag in ("base", "work", "leaf")}
    assert {file.path for file in layers.counts} == opened.keys()
    assert threading.get_ident() not in layers.threads
    (leaf,) = {image for image in found if image.tag == "leaf"}
    assert leaf.view.read(0, SIZE) == LEAF


def test_while_a_layer_is_slow_the_event_loop_and_other_clients_go_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tree_of(root)
    layers = Called(monkeypatch, "open_layer")

    async def main(opener: ImageOpener) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opener.image, "leaf")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert opener.lanes.busy == 1
            # It has taken one of the threads of its filesystem, which has more.
            state = await opener.child(await folder(opener, "leaf"), "vmstate")
            assert isinstance(state, Passed)
            assert await opener.run(state, os.path.exists, root) is True
            layers.go_on.set()

    run(main, tree)


def test_a_memory_file_is_opened_when_its_name_is_looked_up_or_its_folder_listed(
    root: Path,
) -> None:
    tree = tree_of(root)
    assert tree.store is not None
    store = tree.store

    async def main(opener: ImageOpener) -> None:
        work = await folder(opener, "work")
        assert store.opened("work") is None
        node = await opener.child(work, "memory.bin")
        assert node == MemoryFile(await opener.image("work")) == tree.child(work, "memory.bin")
        leaf = await folder(opener, "leaf")
        names = await opener.names(leaf)
        assert names == (b"memory.bin", b"snapshot.json", b"vmstate")
        assert store.opened("leaf") is not None
        assert await opener.names(Root()) == (b"base", b"leaf", b"work")
        with pytest.raises(FileNotFoundError):
            await opener.child(work, "none")

    run(main, tree)


def test_a_refusal_reaches_every_client_and_hides_no_other_name(root: Path) -> None:
    memory = root / "leaf" / "memory.bin"
    memory.write_bytes(memory.read_bytes())
    age(memory)
    tree = tree_of(root)
    refused = []

    async def ask(opener: ImageOpener) -> None:
        with pytest.raises(DenseDiffError, match="holes were filled") as caught:
            await opener.image("leaf")
        refused.append(caught.value)

    async def main(opener: ImageOpener) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask, opener)
        leaf = await folder(opener, "leaf")
        assert b"vmstate" in await opener.names(leaf)
        with pytest.raises(DenseDiffError):
            await opener.child(leaf, "memory.bin")
        assert (await opener.image("work")).tag == "work"

    run(main, tree)
    assert len(refused) == 3


def test_a_tag_that_is_not_served_is_no_image(root: Path) -> None:
    async def main(opener: ImageOpener) -> None:
        with pytest.raises(FileAccessError, match="none: no such snapshot is served") as caught:
            await opener.image("none")
        assert caught.value.errno == errno.ENOENT

    run(main, tree_of(root))


def test_a_parent_is_hashed_once_for_all_its_children(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256((root / "base" / "memory.bin").read_bytes()).hexdigest()
    for n in range(3):
        write_tag(root, f"right-{n}", "base", layer=n, parent_content_hash=digest)
    write_tag(root, "wrong", "base", layer=3, parent_content_hash="0" * 64)
    tree = tree_of(root)
    hashed: list[str] = []
    real = Store.require_pin

    def counted(store: Store, parent: Any, link: Any) -> None:
        hashed.append(link.tag)
        real(store, parent, link)

    monkeypatch.setattr(Store, "require_pin", counted)

    async def main(opener: ImageOpener) -> None:
        async with trio.open_nursery() as nursery:
            for n in range(3):
                nursery.start_soon(opener.image, f"right-{n}")
        with pytest.raises(PinError):
            await opener.image("wrong")

    run(main, tree)
    assert hashed[-1] == "wrong" and set(hashed) == {"right-0", "right-1", "right-2", "wrong"}
