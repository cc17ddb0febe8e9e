"""`rediff --store`: the same images in a new store, with true diffs; the old one as it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.checks.verify import open_image as open_to_verify
from diffmergefs.core.errors import (
    BrokenChainError,
    DenseDiffError,
    DiffMergeError,
    FileAccessError,
    LayerChangedError,
    OutputRefusedError,
    VerificationError,
)
from diffmergefs.opening.images import open_image
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars import seal
from diffmergefs.writing.newstore import NewSnapshot
from diffmergefs.writing.sealing import seal_layer
from diffmergefs.writing.storediff import StoreRediff
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.newdiffs import assert_sealed, data_of, harm_writes
from tests.support.stores import (
    BASE_PAGES,
    SIZE,
    age,
    pages,
    write_chain,
    write_document,
    write_numbered,
    write_tag,
)
from tests.support.swaps import Swapped
from tests.support.users import NOBODY

#: What each tag's image is: layers laid one after another.
IMAGES = {
    "base": [pages(0, BASE_PAGES)],
    "work": [pages(0, BASE_PAGES), pages(1, [1])],
    "leaf": [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2]), [(5 * PAGE, bytes(PAGE))]],
}
IMAGES["tip"] = [*IMAGES["leaf"], pages(3, [3])]
IMAGES["other"] = [[(0, signed(9, 0, SIZE)), *pages(0, [0, 1])]]


def image(tag: str) -> bytes:
    return overlay_oracle(SIZE, IMAGES[tag])


def dense(store: Path, tag: str) -> None:
    """Merge the tag's image into its own file, as forkd does."""
    path = store / tag / "memory.bin"
    write_layer(path, SIZE, [(0, image(tag))])
    age(path)


@pytest.fixture
def store(public_path: Path) -> Iterator[Path]:
    """base <- work <- leaf (dense) <- tip, and base <- other (dense, nearly all of it another)."""
    store = write_chain(public_path / "store", ["base", "work", "leaf"])
    dense(store, "leaf")
    write_tag(store, "tip", "leaf", layer=3, volumes=["/v"], note={"a": [1]})
    write_tag(store, "other", "base")
    dense(store, "other")
    with unchanged(path for path in store.rglob("*") if path.is_file()):
        yield store


def convert(store: Path, output: Path, **options: Any) -> dict[str, NewSnapshot]:
    names = ("skip_broken", "policy")
    given = {name: options.pop(name) for name in names if name in options}
    with StoreRediff(store, **given) as opened:
        made = opened.write(output, **options)
    assert made.data_before == sum(s.data_before for s in made.snapshots)
    assert made.data_bytes == sum(s.data_bytes for s in made.snapshots)
    return {snapshot.tag: snapshot for snapshot in made.snapshots}


def document(store: Path, tag: str) -> dict[str, Any]:
    return dict(json.loads((store / tag / "snapshot.json").read_text()))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("jobs", [1, 2])
def test_dense_links_become_true_diffs_and_every_image_is_the_same(
    store: Path, public_path: Path, verify: bool, jobs: int
) -> None:
    new = public_path / "new"
    found = convert(store, new, verify=verify, jobs=jobs)
    assert list(found) == ["base", "other", "work", "leaf", "tip"]  # parents first
    assert {tag: s.done for tag, s in found.items()} == {
        "base": "base",
        "work": "diff",
        "leaf": "rediffed",
        "tip": "diff",
        "other": "rediffed",
    }
    assert found["leaf"] == NewSnapshot("leaf", "work", "rediffed", SIZE, SIZE, 2 * PAGE)
    assert found["base"].data_before == found["base"].data_bytes == 15 * PAGE
    memory = {tag: new / tag / "memory.bin" for tag in IMAGES}
    assert data_of(memory["leaf"]) == [(2 * PAGE, 3 * PAGE), (5 * PAGE, 6 * PAGE)]
    assert data_of(memory["work"]) == [(PAGE, 2 * PAGE)]
    assert data_of(memory["other"]) == [(2 * PAGE, SIZE)]
    for tag in IMAGES:
        with open_image(new / tag).view as view:
            assert view.read(0, SIZE) == image(tag), tag
            assert all(layer.path.startswith(f"{new}/") for layer in view.layers)
    assert sorted(os.listdir(public_path)) == ["new", "store"]


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
    os.chown(leaf / "rootfs.img", NOBODY, NOBODY)
    os.chown(leaf, NOBODY, NOBODY, follow_symlinks=False)
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
        assert (made.st_mode, made.st_uid, made.st_gid) == (old.st_mode, old.st_uid, old.st_gid)
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
    write_document(
        store,
        "leaf",
        json.dumps(
            {
                "memory": str(store / "files/leaf.mem"),
                "vmstate": str(store / "files/leaf.state"),
                "parent_tag": "work",
            }
        ),
    )
    write_document(
        store,
        "other",
        json.dumps({"memory": str(outside / "other.mem"), "parent_tag": "base"}),
    )
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


def test_memory_and_seals_keep_their_owners(store: Path, public_path: Path) -> None:
    for tag, mode in (("base", 0o640), ("work", 0o600), ("leaf", 0o754)):
        os.chown(store / tag / "memory.bin", NOBODY, NOBODY)
        (store / tag / "memory.bin").chmod(mode)
    new = public_path / "new"
    convert(store, new, seal=True)
    for tag, mode in (("base", 0o640), ("work", 0o600), ("leaf", 0o754)):
        memory, beside = (os.stat(new / tag / f"memory.bin{end}") for end in ("", ".bmap"))
        assert (memory.st_uid, memory.st_gid) == (beside.st_uid, beside.st_gid) == (NOBODY, NOBODY)
        assert stat.S_IMODE(memory.st_mode) == mode
        assert stat.S_IMODE(beside.st_mode) == mode & 0o666


# Refusals


def test_a_wrong_pin_is_not_made_right(public_path: Path) -> None:
    store = write_chain(public_path / "store", ["base", "work"])
    write_tag(store, "leaf", "work", layer=2, parent_content_hash="0" * 64)
    write_tag(store, "tip", "leaf", layer=3)
    with pytest.raises(BrokenChainError, match=r"'leaf' is broken: .*its sha256 is .* 0000"):
        convert(store, public_path / "new")
    assert sorted(os.listdir(public_path)) == ["store"]
    with StoreRediff(store, skip_broken=True) as opened:
        made = opened.write(public_path / "new")
    assert [s.tag for s in made.snapshots] == ["base", "work"]
    assert list(made.left_out) == ["leaf", "tip"]
    assert made.left_out["tip"] == "ancestor 'leaf' is broken"


def test_a_right_pin_is_taken_and_then_replaced(store: Path, public_path: Path) -> None:
    write_tag(store, "tip", "leaf", layer=3, parent_content_hash=sha256(store / "leaf/memory.bin"))
    new = public_path / "new"
    with StoreRediff(store) as opened:
        done: list[int] = []
        total = opened.total_bytes
        made = opened.write(new, progress=done.append)
    assert document(new, "tip")["parent_content_hash"] == sha256(new / "leaf/memory.bin")
    dense_links = [s for s in made.snapshots if s.done in ("rediffed", "dense")]
    assert len(dense_links) == 2 and len(made.snapshots) == 5
    copied = sum(s.data_bytes for s in made.snapshots if s not in dense_links)
    # Two images compared, the others' data copied, three parents hashed anew, and one pin.
    assert sum(done) == total == copied + (2 + 3 + 1) * SIZE
    write_tag(store, "tip", "leaf", layer=3, volumes=["/v"], note={"a": [1]})


def test_what_is_broken_is_refused_or_left_out(store: Path, public_path: Path) -> None:
    write_tag(store, "orphan", "nobody")
    filled = write_tag(store, "filled", "base", layer=4, numbers=[4])
    write_layer(filled / "memory.bin", SIZE, [(0, overlay_oracle(SIZE, [pages(4, [4])]))])
    write_tag(store, "above", "filled", layer=5)
    with pytest.raises(BrokenChainError, match="parent 'nobody' of 'orphan' is missing"):
        StoreRediff(store)
    with StoreRediff(store, skip_broken=True) as opened:
        made = opened.write(public_path / "new")
    assert set(made.left_out) == {"orphan", "filled", "above"}
    assert "looks like a diff whose holes were filled" in made.left_out["filled"]
    assert set(os.listdir(public_path / "new")) == set(IMAGES)
    # What the user vouches for is as elsewhere.
    policy = TrustPolicy(dense=True)
    found = convert(store, public_path / "vouched", skip_broken=True, policy=policy)
    assert found["filled"].done == "rediffed"
    with pytest.raises(DenseDiffError):
        open_image(store / "filled")


@pytest.mark.parametrize("where", ["store", "store/new", "store/base/new"])
def test_never_in_place(store: Path, public_path: Path, where: str) -> None:
    with StoreRediff(store) as opened, pytest.raises(OutputRefusedError):
        opened.write(public_path / where)
    (public_path / "alias").symlink_to(store)
    with (
        StoreRediff(public_path / "alias") as opened,
        pytest.raises(OutputRefusedError, match="lies in the store itself"),
    ):
        opened.write(store / "new")
    assert sorted(os.listdir(store)) == sorted(IMAGES)


def test_an_output_that_exists_is_refused(store: Path, public_path: Path) -> None:
    (public_path / "new").mkdir()
    with StoreRediff(store) as opened, pytest.raises(OutputRefusedError, match="exists"):
        opened.write(public_path / "new")


def test_an_output_that_no_document_can_name_is_refused(store: Path, public_path: Path) -> None:
    name = os.fsdecode(os.fsencode(public_path) + b"/\xff")
    with StoreRediff(store) as opened, pytest.raises(OutputRefusedError, match="not valid UTF-8"):
        opened.write(name)
    assert sorted(os.listdir(public_path)) == ["store"]


def test_what_is_no_forkd_store_is_told(public_path: Path) -> None:
    write_numbered(public_path / "layers", ["000-base.mem", "001-work.mem"])
    with pytest.raises(BrokenChainError, match="holds no snapshot of a forkd store"):
        StoreRediff(public_path / "layers")
    for path in (public_path / "missing", ""):
        with pytest.raises(FileAccessError):
            StoreRediff(path)


def test_a_store_that_changes_meanwhile_leaves_nothing(store: Path, public_path: Path) -> None:
    def touch(done: int) -> None:
        (store / "base/vmstate").write_text("another")

    with (
        StoreRediff(store) as opened,
        pytest.raises(LayerChangedError, match="'base' changed while the store was read"),
    ):
        opened.write(public_path / "new", progress=touch)
    assert sorted(os.listdir(public_path)) == ["store"]
    (store / "base/vmstate").write_bytes(b"state of base")
    age(store / "base/vmstate")


def test_a_failure_in_the_middle_leaves_nothing(
    store: Path, public_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm_writes(monkeypatch, 2 * PAGE)  # where the new diff of `leaf` begins
    with (
        StoreRediff(store) as opened,
        pytest.raises(VerificationError, match=f"with this diff byte {2 * PAGE} of"),
    ):
        opened.write(public_path / "new", verify=True)
    assert sorted(os.listdir(public_path)) == ["store"]


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
