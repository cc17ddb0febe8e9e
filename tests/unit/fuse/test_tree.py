"""The mounted tree without a mount: names, attributes, inode numbers, rewritten documents."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import shutil
import socket
import stat
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from diffmergefs.core.errors import DiffMergeError, FileAccessError
from diffmergefs.fuse.access import view_access
from diffmergefs.fuse.nodes import (
    ROOT_INODE,
    Document,
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
from tests.support.openat2 import exchange
from tests.support.stores import (
    BASE_PAGES,
    OLD_NS,
    SECOND_NS,
    SIZE,
    age,
    children,
    opened_beneath,
    pages,
    write_chain,
    write_document,
    write_numbered,
    write_tag,
)
from tests.support.swaps import Swapped

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


def opened(tree: Tree, tag: str) -> MemoryFile:
    assert tree.store is not None
    return MemoryFile(tree.store.open(tag))


def document(tree: Tree, tag: str) -> dict[str, object]:
    node = tree.child(folder_of(tree, tag), "snapshot.json")
    assert isinstance(node, Document)
    found: dict[str, object] = json.loads(tree.passthrough.content(node))
    return found


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


def test_fifos_sockets_devices_seals_and_staging_names_are_left_out(root: Path) -> None:
    folder = root / "work"
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    for name in ("memory.bin.bmap", ".diffmergefs-x", "y.tmp"):
        (folder / name).touch()
    (folder / ".compact-staging-z").mkdir()
    (folder / "kept.bmap").touch()
    tree = tree_of(root)
    assert set(children(tree, folder_of(tree, "work"))) == {"snapshot.json", "vmstate", "kept.bmap"}
    for name in ("fifo", "socket", "memory.bin.bmap", ".diffmergefs-x", "y.tmp"):
        with pytest.raises(FileNotFoundError):
            tree.child(folder_of(tree, "work"), name)


def test_a_symlink_is_passed_through_and_not_followed(root: Path) -> None:
    (root / "work" / "link").symlink_to("/etc/../nowhere")
    tree = tree_of(root)
    link = tree.child(folder_of(tree, "work"), "link")
    assert isinstance(link, Passed)
    assert stat.S_ISLNK(tree.attributes(link).mode)
    assert tree.passthrough.link_target(link) == "/etc/../nowhere"
    with pytest.raises((OSError, FileAccessError)):
        os.close(tree.passthrough.open(link))


def test_a_passed_file_has_its_own_attributes_and_bytes(root: Path) -> None:
    path = root / "work" / "vmstate"
    path.chmod(0o640)
    tree = tree_of(root)
    node = tree.child(folder_of(tree, "work"), "vmstate")
    assert isinstance(node, Passed)
    found, real = tree.attributes(node), path.stat()
    assert found.mode == real.st_mode
    assert found[1:4] == (real.st_uid, real.st_gid, real.st_size)
    assert (found.mtime_ns, found.constant) == (real.st_mtime_ns, False)
    fd = tree.passthrough.open(node)
    try:
        assert os.read(fd, 100) == path.read_bytes()
    finally:
        os.close(fd)


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


def test_a_document_reads_as_a_base_in_the_mountpoint(root: Path) -> None:
    write_tag(
        root, "leaf", "work", layer=2, parent_content_hash="0" * 64, volumes=[{"a": "é"}], x="y"
    )
    tree = tree_of(root)
    assert document(tree, "leaf") == {
        "memory": f"{MOUNTPOINT}/leaf/memory.bin",
        "vmstate": f"{MOUNTPOINT}/leaf/vmstate",
        "volumes": [{"a": "é"}],
    }
    node = tree.child(folder_of(tree, "leaf"), "snapshot.json")
    assert isinstance(node, Document)
    assert tree.attributes(node).size == len(tree.passthrough.content(node))
    assert b"work" not in tree.passthrough.content(node)


def test_a_document_without_vmstate_gets_none(public_path: Path) -> None:
    write_tag(public_path, "base", vmstate=None)
    assert document(tree_of(public_path), "base") == {"memory": f"{MOUNTPOINT}/base/memory.bin"}


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


@contextmanager
def put_in_place_of(path: Path, other: Path) -> Iterator[None]:
    """Put `other` at `path` inside `with`."""
    exchange(path, other)
    try:
        yield
    finally:
        exchange(path, other)


def require_stale(act: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        act()
    assert caught.value.errno == errno.ESTALE


def test_a_node_is_never_another_file_that_is_now_at_its_path(root: Path) -> None:
    work = root / "work"
    (work / "sub").mkdir(0o700)
    (work / "sub" / "note").touch()
    (work / "link").symlink_to("secret")
    bait = root.parent / "bait"
    bait.mkdir()
    for name in ("file", "dir/note"):
        (bait / name).parent.mkdir(exist_ok=True)
        (bait / name).touch()
    (bait / "link").symlink_to("bait")
    tree = tree_of(root)
    folder = folder_of(tree, "work")
    file, sub, link = (tree.child(folder, name) for name in ("vmstate", "sub", "link"))
    assert isinstance(file, Passed) and isinstance(link, Passed)
    with put_in_place_of(work / "vmstate", bait / "file"):
        require_stale(lambda: tree.attributes(file))
        require_stale(lambda: os.close(tree.passthrough.open(file)))
    with put_in_place_of(work / "link", bait / "link"):
        require_stale(lambda: tree.attributes(link))
        require_stale(lambda: tree.passthrough.link_target(link))
    for place, other, node in (("sub", "dir", sub), (".", ".", folder)):
        with put_in_place_of((work / place).resolve(), (bait / other).resolve()):
            require_stale(lambda node=node: tree.attributes(node))  # type: ignore[misc]
            require_stale(lambda node=node: children(tree, node))  # type: ignore[misc]
            require_stale(lambda node=node: tree.child(node, "note"))  # type: ignore[misc]
    assert tree.passthrough.link_target(link) == "secret"
    assert set(children(tree, sub)) == {"note"}
    assert tree.store is not None
    tree.store.look()  # putting it back was a change too
    assert tree.attributes(file).size == len("state of work")


def test_an_open_passed_file_keeps_its_attributes_but_admits_only_its_owner(
    root: Path,
) -> None:
    path = root / "work" / "vmstate"
    path.chmod(0o644)
    tree = tree_of(root)
    node = tree.child(folder_of(tree, "work"), "vmstate")
    assert isinstance(node, Passed)
    fd = tree.passthrough.open(node)
    other = tree.passthrough.open(tree.child(folder_of(tree, "base"), "vmstate"))  # type: ignore[arg-type]
    try:
        path.unlink()
        found = tree.passthrough.attributes_of_open(node, fd)
        assert (found.size, stat.S_IMODE(found.mode)) == (len("state of work"), 0o600)
        require_stale(lambda: tree.passthrough.attributes_of_open(node, other))
    finally:
        os.close(fd)
        os.close(other)


def test_a_document_has_the_attributes_of_the_file_that_was_read(root: Path) -> None:
    path = root / "work" / "snapshot.json"
    path.chmod(0o640)
    tree = tree_of(root)
    folder = folder_of(tree, "work")
    node = tree.child(folder, "snapshot.json")
    assert stat.S_IMODE(tree.attributes(node).mode) == 0o640
    bait = root / "bait.json"
    bait.write_text("{}")
    with put_in_place_of(path, bait):
        # Until the next look its owner gets the content that was read.
        assert stat.S_IMODE(tree.attributes(node).mode) == 0o600
        again = tree.child(folder, "snapshot.json")
        assert isinstance(again, Document) and isinstance(node, Document)
        assert again.replaced and tree.passthrough.content(again) == tree.passthrough.content(node)
    # Putting the file back does not make it public again.
    assert stat.S_IMODE(tree.attributes(again).mode) == 0o600
    assert stat.S_IMODE(tree.attributes(tree.child(folder, "snapshot.json")).mode) == 0o640
    path.rename(root / "work" / "old.json")
    write_tag(root, "work", "base", layer=1)
    assert tree.store is not None
    tree.store.look()
    require_stale(lambda: tree.attributes(node))
    with pytest.raises(OSError):
        tree.passthrough.content(node)


def test_no_moment_of_an_exchange_exposes_a_private_directorys_file(
    public_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_chain(public_path / "store", ["secret"])
    bait = write_tag(public_path, "bait")
    for place, text in ((root / "secret", b"secret"), (bait, b"bait")):
        (place / "note").write_bytes(text)
        (place / "note").chmod(0o644)
    (root / "secret").chmod(0o700)
    tree = tree_of(root)
    swapped = Swapped(monkeypatch, root / "secret", bait)
    read = set()

    def enter(at: tuple[int, ...]) -> None:
        # As the kernel walks for another user: each directory's bits, then the next name.
        with swapped.during(at), suppress(OSError):
            folder = tree.child(Root(), "secret")
            closed = not tree.attributes(folder).mode & 0o001
            node = tree.child(folder, "note")
            assert isinstance(node, Passed)
            assert tree.attributes(node).mode & 0o004
            with open(tree.passthrough.open(node), "rb") as file:
                text = file.read()
            read.add(text)
            assert closed or text == b"bait"

    for at in swapped.moments(lambda: enter(())):
        enter(at)
    assert read == {b"secret", b"bait"}


@pytest.mark.parametrize("name", ["state.tmp", ".compact-staging-state", "vm.part"])
def test_a_vmstate_is_served_under_any_name(root: Path, name: str) -> None:
    write_tag(root, "leaf", "work", layer=2, vmstate=name)
    (root / "leaf" / "beside.tmp").touch()
    tree = tree_of(root)
    found = children(tree, folder_of(tree, "leaf"))
    assert set(found) == {"snapshot.json", name}
    node = tree.child(folder_of(tree, "leaf"), name)
    assert isinstance(node, Passed) and node == found[name]
    assert document(tree, "leaf")["vmstate"] == f"{MOUNTPOINT}/leaf/{name}"
    fd = tree.passthrough.open(node)
    try:
        assert os.read(fd, 100) == b"state of leaf"
    finally:
        os.close(fd)


@pytest.mark.parametrize("broken", ["illegal tag", "bad document"])
def test_the_layer_of_a_broken_tag_is_not_passed_through_elsewhere(root: Path, broken: str) -> None:
    tag = "no legal tag" if broken == "illegal tag" else "bad"
    write_tag(root, tag, "base", layer=3)
    layer = (root / tag / "memory.bin").rename(root / "work" / "other.mem")
    fields = {"memory": str(layer), "parent_tag": "base"}
    if broken == "bad document":
        fields["vmstate"] = "missing"
    write_document(root, tag, json.dumps(fields))
    tree = tree_of(root)
    assert set(children(tree, Root())) == {"base", "work"}
    assert set(children(tree, folder_of(tree, "work"))) == {"snapshot.json", "vmstate"}
    with pytest.raises(FileNotFoundError):
        tree.child(folder_of(tree, "work"), "other.mem")


def test_a_passed_file_does_not_take_the_last_descriptors(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tree_of(root)
    node = tree.child(folder_of(tree, "work"), "vmstate")
    assert isinstance(node, Passed)
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
    with pytest.raises(OSError) as caught:
        os.close(tree.passthrough.open(node))
    assert caught.value.errno == errno.EMFILE
    assert len(os.listdir("/proc/self/fd")) == before
