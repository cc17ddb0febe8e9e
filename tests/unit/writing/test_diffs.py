"""rediff and squash."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.analysis.compare import compare
from diffmergefs.core.errors import (
    DenseDiffError,
    LayerChangedError,
    OutputRefusedError,
    SizeMismatchError,
    VerificationError,
)
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.view import MergedView
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.apply import apply_diff
from diffmergefs.writing.diffs import count_data, rediff, squash
from tests.support.asked import asked
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.layers import poke
from tests.support.newdiffs import assert_sealed, data_of, harm_writes
from tests.support.randomchains import Extents, chains, open_view, write_chain
from tests.support.stores import pages
from tests.support.subjects.diffs import (
    CHAIN,
    CHANGED,
    CHILD,
    MIB,
    PARENT,
    SIZE,
    joined,
    layers,
    sides,
)

__all__ = ["asked", "layers", "sides"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "diff"


@settings(deadline=None, max_examples=50)
@given(chains(2, 5), st.data())
def test_the_diff_laid_over_the_parent_is_the_child(
    case: tuple[int, list[Extents]], draws: st.DataObject
) -> None:
    size, chain = case
    numbers = st.lists(st.integers(0, len(chain) - 1), min_size=1, max_size=3)
    some, others = draws.draw(numbers), draws.draw(numbers)
    page = draws.draw(st.sampled_from([PAGE, 4 * PAGE]))
    before = overlay_oracle(size, [chain[n] for n in some])
    after = overlay_oracle(size, [chain[n] for n in others])
    with tempfile.TemporaryDirectory() as name:
        paths = write_chain(Path(name), size, chain)
        output, whole = Path(name) / "diff", Path(name) / "whole"
        policy = TrustPolicy(page_size=page)
        with (
            unchanged(paths),
            open_view([paths[n] for n in some]) as parent,
            open_view([paths[n] for n in others]) as child,
        ):
            result = rediff(parent, child, output, policy=policy, verify=draws.draw(st.booleans()))
        changed = [
            (at, min(at + page, size))
            for at in range(0, size, page)
            if before[at : at + page] != after[at : at + page]
        ]
        assert data_of(output) == [tuple(e) for e in ExtentList(changed)]
        assert output.stat().st_size == size
        assert result.changed_pages == len(changed)
        written = result.written
        assert (written.size, written.copied + written.shared) == (size, written.data_bytes)
        assert written.data_bytes == sum(stop - start for start, stop in changed)
        assert result.ratio == written.data_bytes / size
        assert written.extents == len(data_of(output))
        assert written.dense is (written.data_bytes == size)
        whole.write_bytes(before)
        policy = TrustPolicy(page_size=page, dense=True)
        assert apply_diff(output, whole, policy=policy, force={"order"}) == written.data_bytes
        assert whole.read_bytes() == after


def test_written_zeros_over_a_hole_are_no_change(tmp_path: Path) -> None:
    parent = open_view([write_layer(tmp_path / "parent", SIZE, [])])
    child = open_view([write_layer(tmp_path / "child", SIZE, [(0, bytes(SIZE))])])
    result = rediff(parent, child, tmp_path / "diff")
    assert (result.changed_pages, data_of(tmp_path / "diff")) == (0, [])
    assert result.compared_bytes == SIZE


def test_of_a_store_only_what_differs_is_read(
    tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    paths = write_chain(tmp_path, SIZE, [PARENT, pages(1, [3]), pages(2, [9])])
    result = rediff(open_view(paths[:2]), open_view(paths), tmp_path / "diff")
    assert result.compared_bytes == PAGE
    # The last one is for writing it.
    files = [name for name, offset, length in asked if (offset, length) == (9 * PAGE, PAGE)]
    assert files == ["000.mem", "002.mem", "002.mem"] and len(asked) == 3


def test_processes_write_the_same(tmp_path: Path) -> None:
    size = 33 * MIB
    parent = open_view([write_layer(tmp_path / "parent", size, pages(0, range(0, 8448, 7)))])
    child = open_view([write_layer(tmp_path / "child", size, pages(1, range(0, 8448, 77)))])
    done: list[int] = []
    alone = rediff(parent, child, tmp_path / "one")
    shared = rediff(parent, child, tmp_path / "two", jobs=2, progress=done.append, verify=True)
    assert alone == shared
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert data_of(tmp_path / "one") == data_of(tmp_path / "two")
    assert sum(done) == shared.compared_bytes and len(done) == 3


def test_a_child_that_differs_everywhere_gives_a_diff_without_a_hole(tmp_path: Path) -> None:
    parent = open_view([write_layer(tmp_path / "parent", SIZE, [])])
    child = open_view([write_layer(tmp_path / "child", SIZE, [(0, signed(1, 0, SIZE))])])
    assert rediff(parent, child, tmp_path / "diff").written.dense
    whole = write_layer(tmp_path / "whole", SIZE, [])
    with pytest.raises(DenseDiffError):
        apply_diff(tmp_path / "diff", whole)


# The output


def test_outputs_that_are_inputs_or_exist_are_refused(
    sides: tuple[MergedView, MergedView], out: Path
) -> None:
    parent, child = sides
    for view in sides:
        for force in (False, True):
            with pytest.raises(OutputRefusedError):
                rediff(parent, child, view.layers[0].path, force=force)
    out.write_text("mine")
    with pytest.raises(OutputRefusedError, match="--force"):
        rediff(parent, child, out)
    assert out.read_text() == "mine"
    rediff(parent, child, out, force=True, seal=True)
    assert_sealed(out, CHANGED)


def test_sizes_that_differ_are_refused_and_leave_nothing(
    sides: tuple[MergedView, MergedView], tmp_path: Path, out: Path
) -> None:
    longer = open_view([write_layer(tmp_path / "longer", SIZE + PAGE, [])])
    with pytest.raises(SizeMismatchError, match=f"longer: {SIZE + PAGE} bytes, but .* has {SIZE}"):
        rediff(sides[0], longer, out)
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize("which", ["parent", "child"])
def test_a_side_that_changes_meanwhile_leaves_nothing(
    tmp_path: Path, out: Path, which: str
) -> None:
    files = {"parent": PARENT, "child": CHILD}
    paths = {name: write_layer(tmp_path / name, SIZE, e) for name, e in files.items()}
    with pytest.raises(LayerChangedError, match=which):
        rediff(
            open_view([paths["parent"]]),
            open_view([paths["child"]]),
            out,
            progress=lambda done: poke(paths[which], 0, b"x"),
        )
    assert os.listdir(out.parent) == []


def test_verify_reads_the_file_that_was_written(
    sides: tuple[MergedView, MergedView], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm_writes(monkeypatch, 40 * PAGE)
    with pytest.raises(VerificationError, match=f"{out}: with this diff byte {40 * PAGE} of"):
        rediff(*sides, out, verify=True)
    assert os.listdir(out.parent) == []
    rediff(*sides, out)  # nobody asked
    assert not compare(open_view([Path(sides[0].layers[0].path), out]), sides[1]).equal


@settings(deadline=None, max_examples=50)
@given(chains(2, 6), st.data())
def test_in_place_of_any_diffs_the_new_one_gives_the_same_image(
    case: tuple[int, list[Extents]], draws: st.DataObject
) -> None:
    size, chain = case
    first = draws.draw(st.integers(1, len(chain) - 1))
    last = draws.draw(st.integers(first, len(chain) - 1))
    oracle = overlay_oracle(size, chain)
    with tempfile.TemporaryDirectory() as name:
        paths = write_chain(Path(name), size, chain)
        output = Path(name) / "squashed"
        done: list[int] = []
        with unchanged(paths), open_view(paths) as view:
            assert view.read(0, size) == oracle
            total = count_data(view, first, last)
            verify = draws.draw(st.booleans())
            result = squash(
                view, output, first=first, last=last, verify=verify, progress=done.append
            )
        merged = joined(*chain[first : last + 1])
        assert data_of(output) == merged
        with open_view([*paths[:first], output, *paths[last + 1 :]]) as squashed:
            assert squashed.read(0, size) == oracle
        held = sum(len(data) for extents in chain[first : last + 1] for _, data in extents)
        written = result.written
        assert written.data_bytes == total == sum(stop - start for start, stop in merged)
        assert result.shadowed_bytes == held - total
        assert (result.first, result.last, written.size) == (first, last, size)
        assert written.copied + written.shared == total and written.extents == len(merged)
        assert written.dense is (merged == [(0, size)])
        assert sum(done) == total


def test_the_base_and_the_diffs_beside_are_not_read(
    layers: list[Path], out: Path, asked: list[tuple[str, int, int]]
) -> None:
    squash(open_view(layers), out, first=1, last=2)
    # Nor what a newer one of them hides.
    assert asked == [
        ("001.mem", 2 * PAGE, PAGE),
        ("001.mem", 4 * PAGE, PAGE),
        ("002.mem", 20 * PAGE, PAGE),
        ("002.mem", 40 * PAGE, 2 * PAGE),
    ]
    assert data_of(out) == joined(*CHAIN[1:3])


@pytest.mark.parametrize(
    ("first", "last"), [(0, 1), (2, 1), (1, 4), (4, 4), (-1, 2), (1, -1), (0, None)]
)
def test_numbers_that_are_no_diffs_in_this_order_are_refused(
    layers: list[Path], out: Path, first: int, last: int | None
) -> None:
    with pytest.raises(ValueError, match="of a chain of 4 layers"):
        squash(open_view(layers), out, first=first, last=last)
    assert os.listdir(out.parent) == []


def test_a_base_alone_has_nothing_to_squash(layers: list[Path], out: Path) -> None:
    with pytest.raises(ValueError, match="diffs 1 to 0 of a chain of 1 layer,"):
        squash(open_view(layers[:1]), out)


def test_no_layer_of_the_chain_is_replaced(layers: list[Path]) -> None:
    # The last one is not even among the diffs that are squashed.
    for path in (layers[0], layers[1], layers[3]):
        with pytest.raises(OutputRefusedError, match="is a layer of the image itself"):
            squash(open_view(layers), path, first=1, last=2, force=True)


def test_an_output_is_replaced_only_with_force_and_its_seal_goes(
    layers: list[Path], out: Path
) -> None:
    out.write_text("mine")
    with pytest.raises(OutputRefusedError, match="--force"):
        squash(open_view(layers), out)
    Path(f"{out}.bmap").write_text("stale")
    squash(open_view(layers), out, force=True)
    assert os.listdir(out.parent) == ["diff"]
    squash(open_view(layers), out, force=True, seal=True)
    assert_sealed(out, joined(*CHAIN[1:]))


def test_a_layer_that_changes_meanwhile_leaves_nothing(tmp_path: Path, out: Path) -> None:
    paths = write_chain(tmp_path, SIZE, CHAIN)
    with pytest.raises(LayerChangedError, match=r"002\.mem"):
        squash(open_view(paths), out, progress=lambda done: poke(paths[2], 20 * PAGE, b"x"))
    assert os.listdir(out.parent) == []


def test_verify_of_squash_reads_the_file_that_was_written(
    layers: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm_writes(monkeypatch, 40 * PAGE)
    with pytest.raises(VerificationError, match=f"{out}: with this diff byte {40 * PAGE} of"):
        squash(open_view(layers), out, verify=True)
    assert os.listdir(out.parent) == []
