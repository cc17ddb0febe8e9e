"""`rediff`: the parent with it is the child, data are just the changed pages, and proven to be."""

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
from diffmergefs.writing.rediff import rediff
from tests.support.asked import asked
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.layers import poke
from tests.support.newdiffs import assert_sealed, data_of, harm_writes
from tests.support.randomchains import Extents, chains, open_view, write_chain
from tests.support.stores import pages
from tests.support.subjects.rediff import CHANGED, CHILD, MIB, PARENT, SIZE, sides

__all__ = ["asked", "sides"]


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
