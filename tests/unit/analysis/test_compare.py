"""`compare`: right for every pair of images, and no byte read that is not needed to tell."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.analysis.compare import Comparison, bytes_to_compare, compare, require_equal
from diffmergefs.core.errors import (
    FileAccessError,
    LayerChangedError,
    SizeMismatchError,
    VerificationError,
)
from diffmergefs.core.extents import Extent
from diffmergefs.core.view import MergedView
from tests.support.asked import asked
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.layers import poke
from tests.support.randomchains import Extents, chains, open_view, write_chain
from tests.support.stores import pages

__all__ = ["asked"]

MIB = 1 << 20
KIB = 1 << 10


def differing_pages(one: bytes, other: bytes, page: int) -> list[int]:
    """The oracle: the numbers of the pages that differ."""
    starts = range(0, len(one), page)
    return [n for n, at in enumerate(starts) if one[at : at + page] != other[at : at + page]]


def numbers_of(found: Comparison) -> list[int]:
    page = found.page_size
    return [n for start, stop in found.ranges for n in range(start // page, -(-stop // page))]


def first_difference(one: bytes, other: bytes) -> int | None:
    return next((n for n, (x, y) in enumerate(zip(one, other, strict=True)) if x != y), None)


@settings(deadline=None, max_examples=60)
@given(chains(1, 6), st.data())
def test_any_two_views_of_layers_that_are_partly_shared(
    case: tuple[int, list[Extents]], draws: st.DataObject
) -> None:
    size, chain = case
    indices = st.lists(st.integers(0, len(chain) - 1), min_size=1, max_size=4)
    numbers = [draws.draw(indices), draws.draw(indices)]
    page = draws.draw(st.sampled_from([512, PAGE, 4 * PAGE, MIB]))
    images = [overlay_oracle(size, [chain[n] for n in some]) for some in numbers]
    with tempfile.TemporaryDirectory() as name:
        paths = write_chain(Path(name), size, chain)
        views = [open_view([paths[n] for n in some]) for some in numbers]
        done: list[int] = []
        with unchanged(paths), views[0] as a, views[1] as b:
            found = compare(a, b, page_size=page, progress=done.append)
            total = bytes_to_compare(a, b)
            assert compare(b, a, page_size=page).ranges == found.ranges
    assert found.first == first_difference(*images)
    assert found.equal is (images[0] == images[1])
    assert numbers_of(found) == differing_pages(images[0], images[1], page)
    assert found.differing_pages == len(numbers_of(found))
    assert (found.size, found.page_size) == (size, page)
    assert all(start % page == 0 for start, _ in found.ranges)
    assert all(stop % page == 0 or stop == size for _, stop in found.ranges)
    assert sum(done) == found.compared_bytes == total


def pair(
    directory: Path, size: int, one: Sequence[Extents], other: Sequence[Extents]
) -> tuple[MergedView, MergedView]:
    """Two views: the layers of the first are a0, a1 ..., those of the second b0, b1 ..."""
    views = []
    for side, chain in (("a", one), ("b", other)):
        files = [write_layer(directory / f"{side}{n}", size, e) for n, e in enumerate(chain)]
        views.append(open_view(files))
    return views[0], views[1]


def test_what_both_take_from_one_layer_file_is_not_read(
    tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    chain = [pages(0, range(12)), pages(1, [2, 3, 8]), pages(2, [3, 9])]
    paths = write_chain(tmp_path, 16 * PAGE, chain)
    # Opened twice: it is the file that counts, not who opened it.
    parent, child = open_view(paths[:2]), open_view(paths)
    found = compare(parent, child)
    assert numbers_of(found) == [3, 9] and found.compared_bytes == 2 * PAGE
    pages_asked = [(name, offset // PAGE, length // PAGE) for name, offset, length in asked]
    # And once more for the first difference, in its page.
    assert pages_asked == [
        ("001.mem", 3, 1),
        ("002.mem", 3, 1),
        ("000.mem", 9, 1),
        ("002.mem", 9, 1),
        ("001.mem", 3, 1),
        ("002.mem", 3, 1),
    ]
    asked.clear()
    assert compare(child, open_view(paths)).equal
    assert asked == []


def test_a_copy_of_a_layer_is_another_file_and_is_read(
    tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    a, b = pair(tmp_path, 4 * PAGE, [pages(0, [1])], [pages(0, [1])])
    assert compare(a, b).equal
    assert asked == [("a0", PAGE, PAGE), ("b0", PAGE, PAGE)]


def test_holes_in_both_are_not_read_and_a_hole_in_one_is_zeros(
    tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    zeros = [(4 * PAGE, bytes(PAGE))]
    a, b = pair(tmp_path, 8 * PAGE, [pages(0, [1])], [zeros + pages(1, [6])])
    found = compare(a, b)
    assert numbers_of(found) == [1, 6] and found.first == PAGE
    pages_asked = [(name, offset // PAGE) for name, offset, _ in asked]
    assert pages_asked == [("a0", 1), ("b0", 4), ("b0", 6), ("a0", 1)]
    assert found.compared_bytes == 3 * PAGE


def test_large_equal_files_are_read_once_in_large_pieces(
    tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    size = 33 * MIB + 100  # three windows, and an odd end
    content = [(0, signed(1, 0, size))]
    a, b = pair(tmp_path, size, [content], [content])
    assert compare(a, b).equal
    for name in "ab":
        mine = [(offset, length) for called, offset, length in asked if called == f"{name}0"]
        assert mine == [(at, min(256 * KIB, size - at)) for at in range(0, size, 256 * KIB)]


@pytest.mark.parametrize("jobs", [2, 3])
def test_processes_find_the_same(tmp_path: Path, jobs: int) -> None:
    size = 40 * MIB + 100
    ours = bytearray(signed(1, 0, size))
    a = open_view([write_layer(tmp_path / "a", size, [(0, bytes(ours))])])
    for offset in (0, 5000, 16 * MIB - 1, 16 * MIB, 20 * MIB, 39 * MIB, size - 1):
        ours[offset] ^= 1
    b = open_view([write_layer(tmp_path / "b", size, [(0, bytes(ours))])])
    alone = compare(a, b)
    assert alone.differing_pages == 7 and alone.first == 0
    done: list[int] = []
    assert compare(a, b, jobs=jobs, progress=done.append) == alone
    assert done == [16 * MIB, 16 * MIB, size - 32 * MIB]


@pytest.mark.parametrize("offset", [0, 1, PAGE - 1, 16 * KIB, 256 * KIB - 1, 256 * KIB, MIB + 77])
def test_a_single_byte_is_found_wherever_it_is(tmp_path: Path, offset: int) -> None:
    size = 2 * MIB
    ours = bytearray(signed(1, 0, size))
    a = open_view([write_layer(tmp_path / "a", size, [(0, bytes(ours))])])
    ours[offset] ^= 0x80
    b = open_view([write_layer(tmp_path / "b", size, [(0, bytes(ours))])])
    found = compare(a, b)
    assert found.first == offset
    start = offset - offset % PAGE
    assert list(found.ranges) == [Extent(start, start + PAGE)]


def test_a_page_that_two_layers_share_is_one_page(tmp_path: Path) -> None:
    # Units of the base's filesystem may be smaller than the guest's page.
    halves = [(0, signed(0, 0, PAGE)), (PAGE, signed(0, PAGE, PAGE))]
    changed = [(0, signed(1, 0, PAGE)), (PAGE, signed(1, PAGE, PAGE))]
    a, b = pair(tmp_path, 8 * PAGE, [halves[:1], halves[1:]], [changed[:1], changed[1:]])
    found = compare(a, b, page_size=2 * PAGE)
    assert list(found.ranges) == [Extent(0, 2 * PAGE)] and found.differing_pages == 1


def test_images_of_different_sizes_are_refused_with_both(tmp_path: Path) -> None:
    a = open_view([write_layer(tmp_path / "a", PAGE, [])])
    b = open_view([write_layer(tmp_path / "b", 2 * PAGE, [])])
    for function in (compare, bytes_to_compare):
        with pytest.raises(SizeMismatchError, match=f"b: {2 * PAGE} bytes, but .*a has {PAGE}"):
            function(a, b)


@pytest.mark.parametrize("page", [0, -1, 3, 4097])
def test_a_page_is_a_power_of_two(tmp_path: Path, page: int) -> None:
    a = open_view([write_layer(tmp_path / "a", PAGE, [])])
    with pytest.raises(ValueError, match="not a power of two"):
        compare(a, a, page_size=page)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_layer_that_changes_meanwhile_is_an_error(tmp_path: Path, jobs: int) -> None:
    size = 33 * MIB
    a, b = pair(tmp_path, size, [pages(0, [0, 5000])], [pages(1, [0, 5000])])
    with pytest.raises(LayerChangedError, match=r"b0: .*mtime"):
        compare(a, b, jobs=jobs, progress=lambda done: poke(tmp_path / "b0", 0, b"x"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_layer_that_ends_early_is_an_error(tmp_path: Path, jobs: int) -> None:
    size = 33 * MIB
    a, b = pair(tmp_path, size, [pages(0, [0, 5000])], [pages(1, [0, 5000])])
    os.truncate(tmp_path / "b0", MIB)
    with pytest.raises(LayerChangedError, match=r"b0: .*it ends before byte"):
        compare(a, b, jobs=jobs)


def test_a_read_error_names_its_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(tmp_path, 4 * PAGE, [pages(0, [1])], [pages(1, [1])])

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(FileAccessError, match="a0: Input/output error"):
        compare(a, b)


def test_require_equal_tells_the_byte(tmp_path: Path) -> None:
    a, b = pair(tmp_path, 4 * PAGE, [pages(0, [1])], [pages(1, [1])])
    require_equal(a, a, "new")
    with pytest.raises(VerificationError, match=f"new: with this diff byte {PAGE + 2} of"):
        require_equal(a, b, "new")
