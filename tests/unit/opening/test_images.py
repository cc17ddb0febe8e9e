"""Opening images: explicit layers, forkd stores, numbered files, any file as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.core.errors import (
    BrokenChainError,
    DenseDiffError,
    DiffMergeError,
    FileAccessError,
    SizeMismatchError,
)
from diffmergefs.opening.images import open_chain, open_image, open_side
from diffmergefs.opening.trust import TrustPolicy
from tests.support.descriptors import opened_below
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.stores import (
    BASE_PAGES,
    SIZE,
    pages,
    write_chain,
    write_numbered,
    write_tag,
)

CHAIN_ORACLE = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2])])


# Explicit layers.


def test_open_chain_lays_the_diffs_over_the_base_oldest_first(tmp_path: Path) -> None:
    chain = [pages(0, range(4)), pages(1, [1, 2]), pages(2, [2])]
    paths = [write_layer(tmp_path / f"{n}", SIZE, extents) for n, extents in enumerate(chain)]
    with unchanged(paths):
        image = open_chain(paths[0], paths[1:])
        assert image.view.read(0, SIZE) == overlay_oracle(SIZE, chain)
    assert not image.dense and image.overridden == []
    assert [layer.path for layer in image.view.layers] == [str(path) for path in paths]
    swapped = open_chain(str(paths[0]), [str(paths[2]), str(paths[1])])
    assert swapped.view.read(2 * PAGE, PAGE) == signed(1, 2 * PAGE, PAGE)


def test_open_chain_of_a_base_alone(tmp_path: Path) -> None:
    path = write_layer(tmp_path / "base", SIZE, pages(0, [3]))
    assert open_chain(path).view.read(0, SIZE) == overlay_oracle(SIZE, [pages(0, [3])])


def test_open_chain_refuses_unequal_sizes_with_both_numbers(tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, [])
    diff = write_layer(tmp_path / "diff", SIZE + PAGE, [])
    with pytest.raises(SizeMismatchError, match=f"{diff}: {SIZE + PAGE} bytes.*{SIZE};"):
        open_chain(base, [diff])


def test_open_chain_names_a_missing_layer(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match=f"{tmp_path}/none: No such file"):
        open_chain(tmp_path / "none")


def test_a_refused_chain_leaves_no_file_open(tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, [])
    diff = write_layer(tmp_path / "diff", SIZE + PAGE, [])
    with pytest.raises(SizeMismatchError):
        open_chain(base, [diff])
    assert opened_below(tmp_path) == set()


# Directories of snapshots.


def test_open_image_of_a_forkd_directory_follows_its_parents(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "one", "two"])
    assert open_image(tmp_path / "two").view.read(0, SIZE) == CHAIN_ORACLE
    assert len(open_image(tmp_path / "one").view.layers) == 2
    assert open_image(f"{tmp_path}/two/").view.read(0, SIZE) == CHAIN_ORACLE


def test_open_image_takes_memory_bin_and_vmstate_without_json_as_a_base(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    write_layer(folder / "memory.bin", SIZE, pages(0, range(16)))
    (folder / "vmstate").write_bytes(b"state")
    write_tag(tmp_path, "child", "plain", layer=1, numbers=[1])
    assert open_image(folder).view.read(0, SIZE) == overlay_oracle(SIZE, [pages(0, range(16))])
    assert len(open_image(tmp_path / "child").view.layers) == 2


def test_open_image_of_a_numbered_file_is_the_chain_up_to_it(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem", "001-one.mem", "002-two.mem"])
    assert open_image(tmp_path / "002-two.mem").view.read(0, SIZE) == CHAIN_ORACLE
    assert len(open_image(tmp_path / "001-one.mem").view.layers) == 2


def test_open_image_through_a_symlink(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "one", "two"])
    (tmp_path / "link").symlink_to(store / "two")
    assert open_image(tmp_path / "link").view.read(0, SIZE) == CHAIN_ORACLE


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("orphan", BrokenChainError, "parent 'none' of 'orphan' is missing"),
        ("nothing", FileAccessError, "No such file"),
        ("", FileAccessError, "empty"),
        ("stray.mem", DiffMergeError, "--base"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(
    name: str, error: type[DiffMergeError], text: str, tmp_path: Path
) -> None:
    write_tag(tmp_path, "orphan", "none", layer=1)
    (tmp_path / "stray.mem").write_bytes(bytes(PAGE))
    with pytest.raises(error, match=text) as caught:
        open_image(tmp_path / name if name else "")
    assert "\n" not in str(caught.value)


def test_open_image_keeps_the_layers_open_and_nothing_else(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "one"])
    image = open_image(tmp_path / "one")
    assert opened_below(tmp_path) == {"base/memory.bin", "one/memory.bin"}
    image.view.close()


# Layers that are shared.


def test_a_numbered_file_of_another_memory_suffix_than_the_base_is_no_image(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem", "001-one.mem"])
    for name in ("001-one.bin", "002-two.bin"):
        write_layer(tmp_path / name, SIZE, pages(7, [7]))
        with pytest.raises(FileAccessError, match=f"{name}: neither a snapshot directory nor"):
            open_image(tmp_path / name)
    assert len(open_image(tmp_path / "001-one.mem").view.layers) == 2


def test_a_suffix_of_ones_own_names_the_layers(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.ram", "001-one.ram"])
    assert len(open_image(tmp_path / "001-one.ram").view.layers) == 2


BASE = pages(0, BASE_PAGES)
MERGED = overlay_oracle(SIZE, [BASE, pages(1, [1]), pages(2, [2])])


def content(path: Path, *diffs: Path, plain: bool = False) -> bytes:
    with open_side(path, diffs, plain=plain).view as view:
        return bytes(view.read(0, view.size))


def test_a_snapshot_directory_is_its_image(tmp_path: Path) -> None:
    store = write_chain(tmp_path, ["base", "work", "leaf"])
    assert content(store / "leaf") == MERGED
    (tmp_path / "link").symlink_to(store / "leaf")
    assert content(tmp_path / "link") == MERGED


def test_the_tags_of_a_chain_are_told_where_it_has_some(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "work", "leaf"])
    numbered = write_numbered(tmp_path / "layers", ["000-base.mem", "001-work.mem"])
    assert open_side(store / "leaf").tags == ("base", "work", "leaf")
    assert open_side(numbered / "001-work.mem").tags == ("base", "work")
    assert open_side(numbered / "001-work.mem", plain=True).tags == ()


def test_a_numbered_layer_is_its_image_unless_it_is_plain(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem", "001-work.mem", "002-leaf.mem"])
    leaf = tmp_path / "002-leaf.mem"
    assert content(leaf) == MERGED
    assert content(leaf, plain=True) == overlay_oracle(SIZE, [pages(2, [2])])


@pytest.mark.parametrize("name", ["mem_file", "20251125-dump", "memory.bin"])
def test_any_other_file_is_an_image_as_it_is(tmp_path: Path, name: str) -> None:
    path = write_layer(tmp_path / name, SIZE, BASE)
    assert content(path) == overlay_oracle(SIZE, [BASE])


def test_a_file_that_may_be_a_layer_above_others_is_an_image_only_if_the_user_says_so(
    tmp_path: Path,
) -> None:
    path = write_layer(tmp_path / "7-dump.raw", SIZE, BASE)
    with pytest.raises(BrokenChainError, match="has holes, and 7 layers are missing below it"):
        content(path)
    assert content(path, plain=True) == overlay_oracle(SIZE, [BASE])
    with open_side(path, policy=TrustPolicy(allow_gaps=True)).view as view:
        assert bytes(view.read(0, view.size)) == overlay_oracle(SIZE, [BASE])


def test_a_plain_file_is_no_business_of_its_neighbours(tmp_path: Path) -> None:
    # Two memory files of one number: no directory of layers, and no reason to refuse this one.
    write_numbered(tmp_path, ["1-a.mem", "01-b.mem"])
    path = write_layer(tmp_path / "mem_file", SIZE, BASE)
    assert content(path) == overlay_oracle(SIZE, [BASE])
    with pytest.raises(BrokenChainError, match="two memory files with the same number"):
        content(tmp_path / "1-a.mem")
    assert content(tmp_path / "1-a.mem", plain=True) == overlay_oracle(SIZE, [BASE])


def test_diffs_lie_over_a_plain_file(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem", "001-work.mem", "002-leaf.mem"])
    base, work, leaf = (tmp_path / n for n in sorted(os.listdir(tmp_path)))
    assert content(base, work, leaf) == MERGED
    # Their checks are those of explicit layers.
    dense = write_layer(tmp_path / "dense", SIZE, [(0, signed(3, 0, SIZE))])
    with pytest.raises(DenseDiffError):
        content(base, dense)


@pytest.mark.parametrize("name", ["missing", "3-missing.mem", ""])
def test_what_is_not_there_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileAccessError):
        open_side(tmp_path / name if name else "")


def test_a_directory_that_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BrokenChainError, match="empty: is neither a snapshot nor"):
        open_side(tmp_path / "empty")
