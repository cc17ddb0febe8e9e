"""`squash`: the chain with the squashed diff is the chain, whichever diffs were taken."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.core.errors import (
    LayerChangedError,
    OutputRefusedError,
    VerificationError,
)
from diffmergefs.writing.squash import count_data, squash
from tests.support.asked import asked
from tests.support.images import PAGE, overlay_oracle
from tests.support.inputs import unchanged
from tests.support.layers import poke
from tests.support.newdiffs import assert_sealed, data_of, harm_writes
from tests.support.randomchains import Extents, chains, open_view, write_chain
from tests.support.subjects.squash import CHAIN, SIZE, joined, layers

__all__ = ["asked", "layers"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "diff"


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
    with pytest.raises(ValueError, match="diffs 1 to 0 of a chain of 1 layers"):
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


def test_verify_reads_the_file_that_was_written(
    layers: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm_writes(monkeypatch, 40 * PAGE)
    with pytest.raises(VerificationError, match=f"{out}: with this diff byte {40 * PAGE} of"):
        squash(open_view(layers), out, verify=True)
    assert os.listdir(out.parent) == []
