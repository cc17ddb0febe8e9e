"""A tag of a new store: its memory, its document, and what stands beside them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from diffmergefs.checks.verify import open_image as open_to_verify
from diffmergefs.core.errors import DiffMergeError, FileAccessError
from diffmergefs.opening.images import open_image
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars import seal
from diffmergefs.writing.newstore import Excluded, copy_file, copy_folder
from diffmergefs.writing.sealing import seal_layer
from tests.support.images import PAGE, signed, write_layer
from tests.support.newdiffs import assert_sealed, data_of
from tests.support.stores import OLD_NS, SIZE, age, pages, write_chain, write_document, write_tag
from tests.support.subjects.newstore import IMAGES, convert, dense, document, image, sha256, store
from tests.support.swaps import Swapped

__all__ = ["store"]


def test_documents_point_into_the_new_store_and_pins_are_those_of_the_new_files(
    store: Path, public_path: Path
) -> None:
    new = public_path / "new"
    convert(store, new)
    for tag, parent in [("work", "base"), ("leaf", "work"), ("tip", "leaf"), ("other", "base")]:
        found = document(new, tag)
        assert found["parent_tag"] == parent
        assert found["parent_content_hash"] == sha256(new / parent / "memory.bin")
        assert found["memory"] == str(new / tag / "memory.bin")
        assert found["vmstate"] == str(new / tag / "vmstate")
        with open_to_verify(str(new / tag), TrustPolicy()) as verification:
            assert verification.verify().sound
    assert "parent_content_hash" not in document(new, "base")
    # The pin of what lies over a link that became small is new; other fields are passed on.
    assert sha256(new / "leaf/memory.bin") != sha256(store / "leaf/memory.bin")
    assert document(new, "tip")["volumes"] == ["/v"]
    assert document(new, "tip")["note"] == {"a": [1]}


def test_what_stands_beside_memory_goes_along(store: Path, public_path: Path) -> None:
    leaf = store / "leaf"
    (leaf / "sub/inner").mkdir(parents=True)
    (leaf / "sub/inner/file").write_text("deep")
    (leaf / "link").symlink_to("sub/inner/file")
    (leaf / "dangling").symlink_to("/nowhere")
    (leaf / "empty").touch()
    write_layer(leaf / "rootfs.img", 4 * PAGE, [(PAGE, b"x" * PAGE)])
    (leaf / "rootfs.img.bmap").write_text("its own")
    (leaf / ".compact-staging-1").write_text("staging")
    (leaf / "x.tmp").write_text("staging")
    os.mkfifo(leaf / "fifo")
    (leaf / "vmstate").chmod(0o640)
    (leaf / "sub").chmod(0o711)
    age(leaf / "rootfs.img")
    new = public_path / "new"
    convert(store, new)
    names = {"memory.bin", "vmstate", "snapshot.json", "sub", "link", "dangling", "empty"}
    assert set(os.listdir(new / "leaf")) == names | {"rootfs.img", "rootfs.img.bmap"}
    assert (new / "leaf/sub/inner/file").read_text() == "deep"
    assert os.readlink(new / "leaf/link") == "sub/inner/file"
    assert os.readlink(new / "leaf/dangling") == "/nowhere"
    assert (new / "leaf/empty").stat().st_size == 0
    assert (new / "leaf/rootfs.img.bmap").read_text() == "its own"
    assert (new / "leaf/vmstate").read_bytes() == b"state of leaf"
    for name in ("vmstate", "sub", "rootfs.img", "memory.bin", "snapshot.json", "", "link"):
        old, made = (os.lstat(root / "leaf" / name) for root in (store, new))
        assert made.st_mode == old.st_mode
    status = (new / "leaf/rootfs.img").stat()
    assert status.st_mtime_ns == (leaf / "rootfs.img").stat().st_mtime_ns
    assert data_of(new / "leaf/rootfs.img") == [(PAGE, 2 * PAGE)]


def test_a_files_mode_does_not_grow(store: Path, public_path: Path) -> None:
    for tag, mode in [("base", 0o640), ("work", 0o600), ("leaf", 0o644)]:
        (store / tag / "memory.bin").chmod(mode)
    store.chmod(0o750)
    new = public_path / "new"
    convert(store, new)
    for tag, mode in [("base", 0o640), ("work", 0o600), ("leaf", 0o644)]:
        assert stat.S_IMODE((new / tag / "memory.bin").stat().st_mode) == mode
    assert stat.S_IMODE(new.stat().st_mode) == 0o750


def test_files_that_lie_elsewhere_come_into_the_tags_directory(
    store: Path, public_path: Path
) -> None:
    (store / "files").mkdir()
    (store / "leaf/memory.bin").rename(store / "files/leaf.mem")
    (store / "leaf/vmstate").rename(store / "files/leaf.state")
    outside = public_path / "outside"
    outside.mkdir()
    (store / "other/memory.bin").rename(outside / "other.mem")
    files = {"memory": f"{store}/files/leaf.mem", "vmstate": f"{store}/files/leaf.state"}
    write_document(store, "leaf", json.dumps(files | {"parent_tag": "work"}))
    files = {"memory": f"{outside}/other.mem"}
    write_document(store, "other", json.dumps(files | {"parent_tag": "base"}))
    new = public_path / "new"
    policy = TrustPolicy(allow_outside=(str(outside),))
    found = convert(store, new, policy=policy)
    assert found["leaf"].done == "rediffed"
    assert set(os.listdir(new)) == {"base", "work", "leaf", "tip", "other"}
    assert set(os.listdir(new / "leaf")) == {"leaf.mem", "leaf.state", "snapshot.json"}
    assert document(new, "leaf")["memory"] == str(new / "leaf/leaf.mem")
    assert document(new, "other")["memory"] == str(new / "other/other.mem")
    for tag in IMAGES:
        with open_image(new / tag).view as view:
            assert view.read(0, SIZE) == image(tag), tag
    for path in (*(store / "files").iterdir(), *outside.iterdir()):
        path.rename(store / path.stem / {".state": "vmstate"}.get(path.suffix, "memory.bin"))
    write_tag(store, "leaf", "work", layer=2)
    dense(store, "leaf")
    write_tag(store, "other", "base")
    dense(store, "other")


def test_a_base_without_a_document_stays_one(public_path: Path) -> None:
    store = write_chain(public_path / "store", ["base", "work"])
    (store / "base/snapshot.json").unlink()
    write_layer(store / "base/memory.bin", SIZE, pages(0, range(16)))
    convert(store, public_path / "new")
    assert sorted(os.listdir(public_path / "new/base")) == ["memory.bin", "vmstate"]
    hashed = sha256(public_path / "new/base/memory.bin")
    assert document(public_path / "new", "work")["parent_content_hash"] == hashed


@pytest.mark.parametrize("all_of_them", [False, True])
def test_seals_are_made_anew(store: Path, public_path: Path, all_of_them: bool) -> None:
    for tag in ("work", "leaf"):
        seal_layer(store / tag / "memory.bin", policy=TrustPolicy(dense=True))
    new = public_path / "new"
    convert(store, new, seal=all_of_them)
    sealed = set(IMAGES) if all_of_them else {"work", "leaf"}
    for tag in IMAGES:
        found = seal.find(str(new / tag / "memory.bin"))
        assert (found is not None) is (tag in sealed)
        if found is not None:
            assert_sealed(new / tag / "memory.bin", data_of(new / tag / "memory.bin"))
    with open_image(new / "tip", TrustPolicy(verify="full")).view as view:
        assert view.read(0, SIZE) == image("tip")


@pytest.mark.slow
def test_no_moment_of_an_exchange_copies_private_files_into_a_public_directory(
    public_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_chain(public_path / "store", ["secret"])
    bait = write_tag(public_path, "bait")
    for folder in (store / "secret", bait):
        (folder / "sub").mkdir()
        (folder / "sub" / "note").write_bytes(os.fsencode(folder.name))
        (folder / "vmstate").write_bytes(os.fsencode(folder.name))
        age(folder / "vmstate")
    (store / "secret").chmod(0o700)
    swapped = Swapped(monkeypatch, store / "secret", bait)
    new = public_path / "new"
    seen = set()

    def copied(at: tuple[int, ...]) -> None:
        with swapped.during(at), suppress(DiffMergeError):
            convert(store, new)
        if new.exists():
            found = {(new / "secret" / name).read_bytes() for name in ("vmstate", "sub/note")}
            seen.update(found)
            assert b"secret" not in found or stat.S_IMODE((new / "secret").stat().st_mode) == 0o700
            shutil.rmtree(new)

    for at in swapped.moments(lambda: copied(()), apart=3):
        copied(at)
    assert b"secret" in seen


NOTHING = Excluded((), ())


def copied(folder: Path, target: Path, excluded: Excluded = NOTHING) -> set[str]:
    """The paths in the copy of the folder."""
    target.mkdir()
    fd = os.open(folder, os.O_PATH)
    try:
        copy_folder(fd, str(folder), str(target), excluded)
    finally:
        os.close(fd)
    return {str(path.relative_to(target)) for path in target.rglob("*")}


def test_a_folder_is_copied_with_its_holes_modes_and_times(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "inner").mkdir(parents=True)
    sparse = write_layer(source / "inner" / "disk", 64 * PAGE, [(PAGE, signed(1, PAGE, PAGE))])
    (source / "empty").touch()
    (source / "link").symlink_to("/nowhere")
    sparse.chmod(0o640)
    age(sparse, source / "empty")
    (source / "inner").chmod(0o500)
    assert copied(source, target) == {"inner", "inner/disk", "empty", "link"}
    copy = target / "inner" / "disk"
    assert copy.read_bytes() == sparse.read_bytes()
    assert copy.stat().st_blocks <= sparse.stat().st_blocks
    assert stat.S_IMODE(copy.stat().st_mode) == 0o640
    assert stat.S_IMODE((target / "inner").stat().st_mode) == 0o500
    assert copy.stat().st_mtime_ns == (target / "empty").stat().st_mtime_ns == OLD_NS
    assert os.readlink(target / "link") == "/nowhere"


def test_what_is_excluded_temporary_or_no_file_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("kept", "by-path", "by-inode", "x.tmp", ".diffmergefs-x"):
        (source / name).write_text(name)
    os.link(source / "by-inode", source / "its-other-name")
    os.mkfifo(source / "fifo")
    monkeypatch.chdir(source)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    status = (source / "by-inode").stat()
    excluded = Excluded({str(source / "by-path")}, {(status.st_dev, status.st_ino)})
    assert copied(source, tmp_path / "target", excluded) == {"kept"}


def test_a_failure_names_the_file_by_its_label(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(FileAccessError, match=r"^the/label: No such file"):
            copy_file(root, "none", str(tmp_path / "target"), "the/label")
    finally:
        os.close(root)
    assert not (tmp_path / "target").exists()
