"""rediff on each file system: written zeros, the grain, shared blocks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.errors import UntrustedExtentsError
from diffmergefs.core.view import MergedView
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.apply import apply_diff
from diffmergefs.writing.diffs import rediff
from diffmergefs.writing.sealing import seal_layer
from tests.support.images import PAGE, signed, write_layer
from tests.support.newdiffs import data_of
from tests.support.randomchains import open_view
from tests.support.stores import pages
from tests.support.subjects.diffs import CHANGED, CHILD, MIB, PARENT, SIZE, sides

__all__ = ["sides"]


def test_on_real_filesystems_pages_that_became_zero_are_data(real_fs: Path) -> None:
    parent = write_layer(real_fs / "parent", SIZE, PARENT)
    child = write_layer(real_fs / "child", SIZE, CHILD)
    output = real_fs / "diff"
    with open_view([parent]) as before, open_view([child]) as after:
        result = rediff(before, after, output, verify=True)
    assert data_of(output) == CHANGED
    assert (result.changed_pages, result.written.data_bytes) == (6, 6 * PAGE)
    content = output.read_bytes()
    assert content[4 * PAGE : 5 * PAGE] == content[31 * PAGE : 32 * PAGE] == bytes(PAGE)
    apply_diff(output, parent)
    assert parent.read_bytes() == child.read_bytes()
    assert sorted(os.listdir(real_fs)) == ["child", "diff", "parent"]


@pytest.mark.parametrize(("kind", "check"), [("xfs16k", "grain"), ("tmpfs_huge", "filesystem")])
def test_where_the_grain_is_coarser_than_the_page_it_is_refused_before_anything_is_read(
    sides: tuple[MergedView, MergedView],
    filesystem: Callable[[str], Path],
    kind: str,
    check: str,
) -> None:
    place = filesystem(kind)
    done: list[int] = []
    with pytest.raises(UntrustedExtentsError) as caught:
        rediff(*sides, place / "diff", progress=done.append)
    assert caught.value.check == check and done == []
    assert "nothing was written under that name" in str(caught.value)
    assert os.listdir(place) == []
    # Vouching does not help: the proof does not go by what somebody says.
    with pytest.raises(UntrustedExtentsError, match="were written, but its filesystem reports"):
        rediff(*sides, place / "diff", policy=TrustPolicy(trust_grain={"all"}))
    assert os.listdir(place) == []


def test_pages_as_large_as_the_grain_are_fine(
    sides: tuple[MergedView, MergedView], filesystem: Callable[[str], Path]
) -> None:
    output = filesystem("xfs16k") / "diff"
    rediff(*sides, output, policy=TrustPolicy(page_size=4 * PAGE))
    wide = [(0, 8), (28, 32), (40, 44), (60, 64)]
    assert data_of(output) == [(start * PAGE, stop * PAGE) for start, stop in wide]


def test_pages_under_which_the_child_has_blocks_that_were_never_written_are_data(
    filesystem: Callable[[str], Path],
) -> None:
    # Reading made them data, as long as they are cached. Their share would be a hole.
    place = filesystem("xfs")
    parent = write_layer(place / "parent", 4 * MIB, [(0, signed(0, 0, 4 * MIB))])
    child = write_layer(place / "child", 4 * MIB, [(0, signed(1, 0, PAGE))])
    with child.open("r+b") as file:
        os.posix_fallocate(file.fileno(), MIB, 2 * MIB)
    child.read_bytes()
    assert data_of(child) == [(0, PAGE), (MIB, 3 * MIB)]
    result = rediff(open_view([parent]), open_view([child]), place / "diff", verify=True)
    assert result.written.dense and result.written.shared == 0
    with (place / "diff").open("rb") as file:
        assert not len(sparse.walk(file.fileno(), 4 * MIB).unwritten)
    shutil.rmtree(place)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_large_pieces_are_shared_where_the_filesystem_can(
    filesystem: Callable[[str], Path], kind: str
) -> None:
    place = filesystem(kind)
    size = 8 * MIB
    parent = write_layer(place / "parent", size, [])
    child = write_layer(place / "child", size, [(0, signed(1, 0, 3 * MIB)), *pages(1, [1000])])
    result = rediff(open_view([parent]), open_view([child]), place / "diff", verify=True)
    assert (result.written.shared, result.written.copied) == (3 * MIB, PAGE)
    assert data_of(place / "diff") == [(0, 3 * MIB), (1000 * PAGE, 1001 * PAGE)]
    assert (place / "diff").read_bytes() == child.read_bytes()
    shutil.rmtree(place)


def test_of_a_sealed_childs_file_nothing_is_shared(filesystem: Callable[[str], Path]) -> None:
    # Its holes are not to be trusted: that is what the seal is for.
    place = filesystem("btrfs")
    base = write_layer(place / "base", 4 * MIB, [(0, signed(0, 0, 4 * MIB))])
    diff = write_layer(place / "diff", 4 * MIB, [(0, bytes(2 * MIB))])
    seal_with_holes(diff)
    parent, child = open_chain(base).view, open_chain(base, [diff]).view
    result = rediff(parent, child, place / "again", verify=True)
    assert data_of(place / "again") == [(0, 2 * MIB)]
    assert result.written.shared == 0
    shutil.rmtree(place)


def seal_with_holes(diff: Path) -> None:
    """Seal the diff, and then turn its zeros into holes, as `cp --sparse=always` does."""
    seal_layer(diff)
    os.truncate(diff, 0)
    os.truncate(diff, 4 * MIB)
    assert data_of(diff) == []
