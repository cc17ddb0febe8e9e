"""Naming one of two images: an IMAGE, or any file as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.core.errors import BrokenChainError, DenseDiffError, FileAccessError
from diffmergefs.opening.sides import open_side
from diffmergefs.opening.trust import TrustPolicy
from tests.support.images import overlay_oracle, signed, write_layer
from tests.support.stores import BASE_PAGES, SIZE, pages, write_chain, write_numbered

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
    with pytest.raises(BrokenChainError, match="two memory files of one number"):
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
    with pytest.raises(BrokenChainError, match="no snapshot 'empty'"):
        open_side(tmp_path / "empty")
