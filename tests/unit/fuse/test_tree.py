"""The mounted tree without a mount: names, attributes and inode numbers."""

from __future__ import annotations

import errno
import gc
import shutil
import stat
import weakref
from pathlib import Path

import pytest

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.fuse.access import view_access
from diffmergefs.fuse.nodes import (
    ROOT_INODE,
    MemoryFile,
    OpenImage,
    Passed,
    Root,
    TagFolder,
)
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.sealing import seal_layer
from tests.support.images import PAGE, write_layer
from tests.support.stores import (
    BASE_PAGES,
    OLD_NS,
    SIZE,
    age,
    children,
    opened_beneath,
    pages,
    write_chain,
    write_numbered,
    write_tag,
)
from tests.support.subjects.tree import MOUNTPOINT, folder_of, root, tree_of

__all__ = ["root"]


def opened(tree: Tree, tag: str) -> MemoryFile:
    assert tree.store is not None
    return MemoryFile(tree.store.open(tag))


def replace_memory(root: Path, tag: str) -> None:
    new = write_layer(root / tag / "new", SIZE, pages(9, BASE_PAGES))
    age(new)
    new.rename(root / tag / "memory.bin")


def test_the_root_has_a_folder_for_each_served_tag(root: Path) -> None:
    write_tag(root, "orphan", "nobody")
    (root / "notes").touch()
    tree = tree_of(root)
    found = children(tree, Root())
    assert {name: node.tag for name, node in found.items() if isinstance(node, TagFolder)} == {
        "base": "base",
        "work": "work",
    }
    assert tree.child(Root(), "work") == found["work"]
    for name in ("orphan", "notes", "nobody"):
        with pytest.raises(FileNotFoundError):
            tree.child(Root(), name)


def test_a_tag_has_its_files_its_document_and_once_open_its_memory(root: Path) -> None:
    (root / "work" / "sub").mkdir()
    (root / "work" / "sub" / "note").touch()
    tree = tree_of(root)
    folder = folder_of(tree, "work")
    assert set(children(tree, folder)) == {"snapshot.json", "vmstate", "sub"}
    with pytest.raises(FileNotFoundError):
        tree.child(folder, "memory.bin")
    memory = opened(tree, "work")
    found = children(tree, folder)
    assert set(found) == {"memory.bin", "snapshot.json", "vmstate", "sub"}
    assert found["memory.bin"] == memory
    for name, node in found.items():
        assert tree.child(folder, name) == node
    assert set(children(tree, found["sub"])) == {"note"}
    assert isinstance(tree.child(found["sub"], "note"), Passed)
    with pytest.raises(NotADirectoryError):
        children(tree, found["vmstate"])


def test_a_refused_memory_file_has_no_entry_and_its_lookup_gives_the_reason(
    public_path: Path,
) -> None:
    write_chain(public_path, ["base", "filled"])
    memory = public_path / "filled" / "memory.bin"
    memory.write_bytes(memory.read_bytes())
    age(memory)
    tree = tree_of(public_path)
    with pytest.raises(DiffMergeError):
        opened(tree, "filled")
    assert set(children(tree, folder_of(tree, "filled"))) == {"snapshot.json", "vmstate"}
    with pytest.raises(DiffMergeError, match="holes were filled"):
        tree.child(folder_of(tree, "filled"), "memory.bin")


def test_numbered_tags_have_only_their_own_files(public_path: Path) -> None:
    names = ["000-base.mem", "001-work.mem"]
    write_numbered(public_path, names, companions=["001-work.vmstate"])
    seal_layer(public_path / "001-work.mem")
    tree = tree_of(public_path)
    opened(tree, "work")
    assert set(children(tree, folder_of(tree, "work"))) == {"001-work.mem", "001-work.vmstate"}
    for name in ("000-base.mem", "001-work.mem.bmap", "snapshot.json"):
        with pytest.raises(FileNotFoundError):
            tree.child(folder_of(tree, "work"), name)
    assert tree.memory_name("base") == "000-base.mem"


def test_a_memory_file_has_the_views_size_and_an_honest_block_count(root: Path) -> None:
    tree = tree_of(root)
    found = tree.attributes(opened(tree, "work"))
    assert stat.S_ISREG(found.mode)
    assert (found.size, found.blocks) == (SIZE, len(BASE_PAGES) * PAGE // 512)
    assert found.constant
    assert found.mtime_ns == OLD_NS


def test_a_memory_file_may_be_opened_for_writing_only_with_open_rw(root: Path) -> None:
    for tag in ("base", "work"):
        (root / tag / "memory.bin").chmod(0o644)
    for open_rw, mode in ((False, 0o444), (True, 0o666)):
        tree = tree_of(root, open_rw=open_rw)
        assert stat.S_IMODE(tree.attributes(opened(tree, "work")).mode) == mode


def test_a_tags_folder_mirrors_its_directory(root: Path) -> None:
    (root / "work").chmod(0o750)
    tree = tree_of(root)
    found = tree.attributes(folder_of(tree, "work"))
    assert found.mode == stat.S_IFDIR | 0o750


def test_inode_numbers_are_stable_until_forgotten_and_never_reused(root: Path) -> None:
    tree = tree_of(root)
    nodes = [*children(tree, folder_of(tree, "work")).values(), folder_of(tree, "work")]
    numbers = [tree.inodes.number(node) for node in nodes]
    assert len({*numbers, ROOT_INODE}) == len(nodes) + 1
    assert [tree.inodes.number(node) for node in nodes] == numbers
    assert [tree.inodes.node(number) for number in numbers] == nodes
    for number in numbers:
        tree.inodes.forget(number)
        with pytest.raises(OSError) as caught:
            tree.inodes.node(number)
        assert caught.value.errno == errno.ESTALE
    again = [tree.inodes.number(node) for node in nodes]
    assert min(again) > max(numbers)


def test_the_root_is_never_forgotten(root: Path) -> None:
    tree = tree_of(root)
    tree.inodes.forget(ROOT_INODE)
    assert tree.inodes.node(ROOT_INODE) == Root()
    assert tree.inodes.number(Root()) == ROOT_INODE


def test_a_memory_file_keeps_its_number_when_it_is_forgotten(root: Path) -> None:
    tree = tree_of(root)
    number = tree.inodes.number(opened(tree, "work"))
    tree.inodes.forget(number)
    gc.collect()
    assert tree.inodes.number(opened(tree, "work")) == number
    assert tree.inodes.node(number) == opened(tree, "work")


def test_a_new_image_has_a_new_number_and_the_old_one_is_still_served(root: Path) -> None:
    tree = tree_of(root)
    old = opened(tree, "base")
    number = tree.inodes.number(old)
    replace_memory(root, "base")
    assert tree.store is not None
    tree.store.look()
    new = opened(tree, "base")
    assert tree.inodes.number(new) > number
    assert tree.inodes.node(number) == old
    assert tree.attributes(old).size == SIZE


def test_a_replaced_passed_file_has_a_new_number(root: Path) -> None:
    tree = tree_of(root)
    folder = folder_of(tree, "work")
    number = tree.inodes.number(tree.child(folder, "vmstate"))
    (root / "work" / "next").write_text("another")
    (root / "work" / "next").rename(root / "work" / "vmstate")
    assert tree.inodes.number(tree.child(folder, "vmstate")) > number


def test_explicit_layers_are_one_file_with_the_bases_name(public_path: Path) -> None:
    base = write_layer(public_path / "mem_file", SIZE, pages(0, BASE_PAGES))
    image = open_chain(base, [write_layer(public_path / "mem_diff", SIZE, pages(1, [1]))])
    shown = OpenImage.of(image.view, "mem_file", view_access(image.view.layers))
    tree = Tree(MOUNTPOINT, explicit=shown)
    assert children(tree, Root()) == {"mem_file": MemoryFile(shown)}
    assert tree.attributes(tree.child(Root(), "mem_file")).size == SIZE
    assert tree.attributes(Root()).mode == public_path.stat().st_mode
    with pytest.raises(FileNotFoundError):
        tree.child(Root(), "mem_diff")


def test_the_root_keeps_its_attributes_when_the_directory_is_deleted(root: Path) -> None:
    root.chmod(0o750)
    tree = tree_of(root)
    known = tree.attributes(Root())
    assert known.mode == stat.S_IFDIR | 0o750
    shutil.rmtree(root)
    assert tree.attributes(Root()) == known
    with pytest.raises(OSError):
        tree_of_deleted(root).attributes(Root())


def tree_of_deleted(root: Path) -> Tree:
    """A tree over a directory that was deleted before the first call of `attributes`."""
    root.mkdir()
    store = Store(str(root), TrustPolicy())
    root.rmdir()
    return Tree(MOUNTPOINT, store)


def test_an_image_that_a_look_dropped_is_not_held_by_its_number(root: Path) -> None:
    """The kernel may remember a name for days. That must not hold a deleted tag's layers open."""
    tree = tree_of(root)
    number = tree.inodes.number(opened(tree, "base"))
    assert tree.store is not None
    shown = weakref.ref(opened(tree, "base").image)
    layer = root / "base" / "memory.bin"
    assert shown() is not None and str(layer) in opened_beneath(root)
    replace_memory(root, "base")
    tree.store.look()
    gc.collect()
    assert shown() is None
    assert opened_beneath(root) == set()
    with pytest.raises(OSError) as caught:
        tree.inodes.node(number)
    assert caught.value.errno == errno.ESTALE
