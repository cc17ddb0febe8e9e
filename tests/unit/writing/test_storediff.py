"""`rediff --store`: the same images in a new store, with true diffs; the old one as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.core.errors import (
    BrokenChainError,
    DenseDiffError,
    FileAccessError,
    LayerChangedError,
    OutputRefusedError,
    VerificationError,
)
from diffmergefs.opening.images import open_image
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.newstore import NewSnapshot
from diffmergefs.writing.storediff import StoreRediff
from tests.support.images import PAGE, overlay_oracle, write_layer
from tests.support.newdiffs import data_of, harm_writes
from tests.support.stores import SIZE, age, pages, write_chain, write_numbered, write_tag
from tests.support.subjects.newstore import IMAGES, convert, document, image, sha256, store

__all__ = ["store"]


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
