"""Links without a hole: complete images, or diffs whose holes a copy filled."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path

import pytest

from diffmergefs.core.errors import DenseDiffError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.opening.dense import _spread_pages, sample
from diffmergefs.opening.images import open_chain, open_image
from diffmergefs.opening.trust import TrustPolicy
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.stores import (
    SIZE,
    pages,
    write_chain,
    write_tag,
)


def dense(keeps: Sequence[int], count: int = 16) -> list[tuple[int, bytes]]:
    """A diff without a hole: these pages signed, all others written zeros."""
    return [(0, bytes(count * PAGE)), *pages(1, keeps)]


def test_an_explicit_diff_without_a_hole_needs_the_users_word(tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, pages(0, range(16)))
    full = write_layer(tmp_path / "full", SIZE, pages(1, range(16)))
    with pytest.raises(DenseDiffError, match=f"{full}: .*--dense"):
        open_chain(base, [full])
    image = open_chain(base, [full], TrustPolicy(dense=True))
    assert image.dense
    assert image.view.read(0, SIZE) == signed(1, 0, SIZE)


@pytest.mark.parametrize(
    ("equal", "cleared", "complete"),
    [
        (20, 0, True),
        (10, 10, True),
        (9, 11, False),  # half of the diff written: it was taken for complete once
        (9, 10, False),
        (2, 0, True),
        (1, 0, False),  # all but one page written anew: another memory, not a merge
        (0, 0, False),
        (0, 20, False),
    ],
)
def test_a_dense_link_is_complete_if_it_is_like_its_parent(
    equal: int, cleared: int, complete: bool, tmp_path: Path
) -> None:
    # Twenty pages are not zero in the parent; two more are written zeros, ten are holes.
    size = 32 * PAGE
    write_tag(tmp_path, "base", numbers=range(20), size=size)
    with (tmp_path / "base" / "memory.bin").open("r+b") as file:
        file.seek(20 * PAGE)
        file.write(bytes(2 * PAGE))
    write_tag(tmp_path, "full", "base", layer=1, size=size)
    held = [(0, bytes(size)), *pages(0, range(equal)), *pages(1, range(equal, 32 - cleared))]
    held += [(n * PAGE, bytes(PAGE)) for n in range(equal, equal + cleared)]
    write_layer(tmp_path / "full" / "memory.bin", size, held)
    if complete:
        image = open_image(tmp_path / "full")
        assert image.dense
        assert image.view.read(0, size) == overlay_oracle(size, [held])
    else:
        text = f"holes were filled: of 20 pages .* {cleared} are zero in it and {equal} equal"
        with pytest.raises(DenseDiffError, match=text):
            open_image(tmp_path / "full")
        assert open_image(tmp_path / "full", TrustPolicy(dense=True)).dense


def test_a_diff_whose_holes_a_copy_filled_is_refused_and_so_are_its_children(
    tmp_path: Path,
) -> None:
    write_chain(tmp_path, ["base", "one", "two"])
    path = tmp_path / "one" / "memory.bin"
    path.write_bytes(path.read_bytes())
    for tag in ("one", "two"):
        with pytest.raises(DenseDiffError, match=r"one/memory\.bin: looks like a diff whose holes"):
            open_image(tmp_path / tag)


def test_a_dense_link_below_the_newest_does_not_make_the_image_dense(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "one", "two"])
    merged = [(0, signed(0, 0, SIZE)), *pages(1, range(8))]
    write_layer(tmp_path / "one" / "memory.bin", SIZE, merged)
    assert open_image(tmp_path / "one").dense
    image = open_image(tmp_path / "two")
    assert not image.dense
    expected = overlay_oracle(SIZE, [merged, pages(2, [2])])
    assert image.view.read(0, SIZE) == expected


def test_a_dense_link_over_a_parent_of_zeros_is_complete(tmp_path: Path) -> None:
    write_tag(tmp_path, "base", numbers=[])
    write_tag(tmp_path, "full", "base", layer=1, numbers=range(16))
    assert open_image(tmp_path / "full").dense


def test_a_sample_is_of_4096_pages_spread_over_the_whole_image(tmp_path: Path) -> None:
    size = 10_000 * PAGE
    base = Layer.open(str(write_layer(tmp_path / "base", size, [(0, signed(0, 0, size))])))
    # Only the first half is kept: a sample of the first 4,096 pages would miss what was filled.
    kept = [(0, signed(1, 0, size // 2)), (size // 2, bytes(size // 2))]
    layer = Layer.open(str(write_layer(tmp_path / "full", size, kept)))
    found = sample(MergedView([base]).read, base.extents, layer)
    assert found.over == 4096
    assert abs(found.zero - 2048) < 40


@pytest.mark.parametrize(
    ("extents", "expected"),
    [
        ([], []),
        ([(0, PAGE)], [0]),
        ([(0, 5 * PAGE), (7 * PAGE, 8 * PAGE)], [0, 1, 2, 3, 4, 7]),
        ([(3 * PAGE, 3 * PAGE + 1)], [3]),
        # Extents of 1 KiB, of which some share a page.
        ([(0, 1024), (2048, 3072), (3 * 1024, 6 * 1024), (7 * 1024, 8 * 1024)], [0, 1]),
        ([(n * PAGE, (n + 1) * PAGE) for n in range(0, 500, 2)], list(range(0, 500, 2))),
    ],
)
def test_every_page_with_data_is_visited_exactly_once(
    extents: list[tuple[int, int]], expected: list[int]
) -> None:
    found = list(_spread_pages(ExtentList(extents)))
    assert sorted(found) == [page * PAGE for page in expected]


@pytest.mark.parametrize("total", [4096, 65_537, 720_720, 1 << 20, 1 << 24])
@pytest.mark.parametrize("count", [10, 100, 700, 4096])
def test_the_first_pages_visited_are_spread_evenly(total: int, count: int) -> None:
    count = min(count, total)
    visited = sorted(islice(_spread_pages(ExtentList([(0, total * PAGE)])), count))
    gaps = [b - a for a, b in pairwise([*visited, total * PAGE])]
    assert visited[0] == 0
    assert max(gaps) <= 4 * total * PAGE / count


def test_reading_a_sample_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffmergefs.opening.dense._MOST", 200)
    monkeypatch.setattr("diffmergefs.opening.dense._SAMPLE", 100)
    monkeypatch.setattr("diffmergefs.opening.dense._ENOUGH", 3)
    asked: list[int] = []
    real = Layer.read_into

    def counted(self: Layer, buffer: memoryview, offset: int, *, nowait: bool = False) -> None:
        asked.append(offset)
        real(self, buffer, offset, nowait=nowait)

    monkeypatch.setattr(Layer, "read_into", counted)
    size = 1000 * PAGE
    for written, reads in ((1000, 100), (20, None), (0, 200)):
        held = [(0, bytes(size)), *pages(0, range(0, 1000, 1000 // max(written, 1))[:written])]
        base = Layer.open(str(write_layer(tmp_path / "base", size, held)))
        asked.clear()
        sample(MergedView([base]).read, base.extents, base)
        pages_read = len(asked) // 2
        assert pages_read == reads if reads else 100 <= pages_read < 200
