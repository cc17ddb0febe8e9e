"""What stands beside the images: passed through by descriptor, or rewritten."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from diffmergefs.core.errors import FileAccessError
from diffmergefs.core.identity import FileKey
from diffmergefs.fuse.nodes import Document, Passed, Root
from diffmergefs.fuse.passthrough import rewritten
from diffmergefs.stores.snapshot import Snapshot, StoredFile
from tests.support.openat2 import exchange
from tests.support.stores import age, children, write_chain, write_document, write_tag
from tests.support.subjects.tree import MOUNTPOINT, document, folder_of, root, tree_of
from tests.support.swaps import Swapped

__all__ = ["root"]


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


def test_a_file_in_another_directory_is_as_hidden_as_there(root: Path) -> None:
    shared = root / "shared"
    shared.mkdir()
    (shared / "vm.state").write_bytes(b"shared state")
    (shared / "vm.state").chmod(0o644)
    age(shared / "vm.state")
    fields = {"memory": "memory.bin", "parent_tag": "base", "vmstate": f"{shared}/vm.state"}
    write_document(root, "work", json.dumps(fields))
    tree = tree_of(root)
    node = tree.child(folder_of(tree, "work"), "vm.state")
    assert isinstance(node, Passed) and node.elsewhere
    for mode, expected in ((0o755, 0o644), (0o700, 0o600)):
        shared.chmod(mode)
        assert stat.S_IMODE(tree.attributes(node).mode) == expected
    assert document(tree, "work")["vmstate"] == f"{MOUNTPOINT}/work/vm.state"


def test_only_what_belongs_to_the_memory_is_device_state(root: Path) -> None:
    (root / "work" / "log").write_text("x")
    tree = tree_of(root)
    for name, expected in (("vmstate", True), ("log", False)):
        node = tree.child(folder_of(tree, "work"), name)
        assert isinstance(node, Passed)
        assert tree.passthrough.is_device_state(node) is expected


def test_a_document_keeps_what_it_says_of_other_things() -> None:
    memory = StoredFile("a/mem.bin", FileKey(1, 2, 3, 4))
    known = {"memory": "/old/mem.bin", "parent_tag": "b", "parent_content_hash": "0", "x": [1]}
    for vmstate, more in ((None, {}), ("state", {"vmstate": "/view/a/state"})):
        snapshot = Snapshot("a", "b", memory, document=known, vmstate=vmstate)
        expected = {"memory": "/view/a/mem.bin", "x": [1], **more}
        assert json.loads(rewritten(snapshot, "/view")) == expected
    assert known["parent_tag"] == "b"
