"""What a diff's bytes tell of its holes, and how often they are read for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from pathlib import Path

import pytest

from diffmergefs.core.errors import DenseDiffError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.opening import content
from diffmergefs.opening.content import Pages, _spread_pages, compare_pages, sample
from diffmergefs.opening.images import open_chain, open_image, open_snapshot
from diffmergefs.opening.opener import LayerPool
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import read_catalog
from tests.support.commands import succeed
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.stores import (
    SIZE,
    pages,
    write_chain,
    write_tag,
)
from tests.support.subjects.content import dense_store, write_at


def test_pages_are_zero_equal_other_or_new(tmp_path: Path) -> None:
    size = 5 * PAGE + 100
    base = Layer.open(str(write_layer(tmp_path / "base", size, pages(0, range(1, 4)))))
    held = [(0, bytes(size)), *pages(0, [1]), *pages(1, [0, 3]), (5 * PAGE, b"end" * 10)]
    layer = Layer.open(str(write_layer(tmp_path / "diff", size, held)))
    found = compare_pages(MergedView([base]).read, layer, 0, size)
    assert found == Pages(zero=1, equal=1, other=1, new=2)
    assert (found.over, found.written) == (3, 4)
    assert compare_pages(None, layer, 0, size) == Pages(zero=2, equal=0, other=4, new=0)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the layers whose pages were sampled, each time that it happens."""
    found: list[str] = []
    real = content.sample

    def counted(parents: content.Read, below: ExtentList, layer: Layer) -> Pages:
        found.append(layer.path)
        return real(parents, below, layer)

    monkeypatch.setattr(content, "sample", counted)
    return found


def opened(store: Path, tags: Iterable[str], policy: TrustPolicy) -> None:
    """Open each tag by itself, as a mount does: only what is remembered links them."""
    catalog = read_catalog(str(store))
    root = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    try:
        pool = LayerPool(root, policy)
        for tag in tags:
            assert open_snapshot(catalog.chain(tag), pool, policy).dense
    finally:
        os.close(root)


@pytest.mark.parametrize("newest_first", [False, True])
def test_each_dense_link_of_a_store_is_sampled_once(
    tmp_path: Path, looks: list[str], newest_first: bool
) -> None:
    tags = dense_store(tmp_path / "store", 20)
    policy = TrustPolicy(state_dir=str(tmp_path / "state"))
    opened(tmp_path / "store", reversed(tags) if newest_first else tags, policy)
    assert len(looks) == len(set(looks)) == 20


def test_what_was_found_is_known_in_later_runs_until_a_layer_is_another(
    tmp_path: Path, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffmergefs.sidecars.verified.COARSE_TICK_NS", 0)
    monkeypatch.setattr("diffmergefs.sidecars.verified.TICK_NS", 0)
    tags = dense_store(tmp_path / "store", 3)
    policy = TrustPolicy(state_dir=str(tmp_path / "state"))
    opened(tmp_path / "store", tags, policy)
    opened(tmp_path / "store", tags, policy)
    assert len(looks) == 3
    opened(tmp_path / "store", tags, TrustPolicy(state_dir=policy.state_dir, verify="full"))
    assert len(looks) == 6
    # Those above another layer are looked into again, those below it not.
    write_at(tmp_path / "store" / "t001" / "memory.bin", 3)
    opened(tmp_path / "store", tags, policy)
    assert [path.split("/")[0] for path in looks[6:]] == ["t001", "t002"]


def test_a_refusal_is_found_once_for_all_descendants(tmp_path: Path, looks: list[str]) -> None:
    store = tmp_path / "store"
    tags = dense_store(store, 20)
    write_layer(store / "t000" / "memory.bin", 16 * PAGE, [(0, bytes(16 * PAGE)), *pages(1, [1])])
    found = json.loads(succeed("list", "--json", f"--state-dir={tmp_path / 'state'}", store))
    assert [row["state"] for row in found] == ["complete", *["broken"] * 20]
    catalog = read_catalog(str(store))
    root = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    pool = LayerPool(root, TrustPolicy())
    for tag in tags:
        with pytest.raises(DenseDiffError):
            open_snapshot(catalog.chain(tag), pool, TrustPolicy())
    os.close(root)
    assert looks == ["t000/memory.bin"]


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
    monkeypatch.setattr("diffmergefs.opening.content._MOST", 200)
    monkeypatch.setattr("diffmergefs.opening.content._SAMPLE", 100)
    monkeypatch.setattr("diffmergefs.opening.content._ENOUGH", 3)
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
