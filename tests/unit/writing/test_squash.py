"""`squash`: the chain with the squashed diff is the chain, whichever diffs were taken."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.core.errors import (
    LayerChangedError,
    OutputRefusedError,
    UntrustedExtentsError,
    VerificationError,
)
from diffmergefs.core.extents import ExtentList
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.sealing import seal_layer
from diffmergefs.writing.squash import count_data, squash
from tests.support.asked import asked
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.layers import poke
from tests.support.newdiffs import assert_sealed, data_of, harm_writes
from tests.support.randomchains import Extents, chains, open_view, write_chain
from tests.support.stores import pages

__all__ = ["asked"]

MIB = 1 << 20
SIZE = 64 * PAGE
ZEROS = [(4 * PAGE, bytes(PAGE))]
CHAIN: list[Extents] = [
    pages(0, range(32)),
    [*pages(1, [2, 20]), *ZEROS],
    [*pages(2, [20, 40]), (41 * PAGE, bytes(PAGE))],
    pages(3, [2, 63]),
]
IMAGE = bytes(overlay_oracle(SIZE, CHAIN))


def joined(*layers: Extents) -> list[tuple[int, int]]:
    """Where any of the layers has data."""
    starts = sorted({(at, at + len(data)) for extents in layers for at, data in extents})
    return [tuple(e) for e in ExtentList(starts)]


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[list[Path]]:
    """The files of CHAIN, which must not change."""
    (tmp_path / "in").mkdir()
    paths = write_chain(tmp_path / "in", SIZE, CHAIN)
    with unchanged(paths):
        yield paths


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


def test_on_real_filesystems_written_zeros_stay_data(real_fs: Path) -> None:
    paths = write_chain(real_fs, SIZE, CHAIN)
    result = squash(open_view(paths), real_fs / "diff", verify=True)
    assert (result.first, result.last) == (1, 3)
    assert data_of(real_fs / "diff") == joined(*CHAIN[1:])
    # Trusted as any diff is, and the same over the base.
    assert open_chain(paths[0], [real_fs / "diff"]).view.read(0, SIZE) == IMAGE
    assert sorted(os.listdir(real_fs)) == ["000.mem", "001.mem", "002.mem", "003.mem", "diff"]


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


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_large_pieces_are_shared_where_the_filesystem_can(
    filesystem: Callable[[str], Path], kind: str
) -> None:
    place = filesystem(kind)
    size = 8 * MIB
    one, other = [(0, signed(1, 0, 4 * MIB))], [(MIB, signed(2, MIB, PAGE)), *pages(2, [2000])]
    paths = write_chain(place, size, [[], one, other])
    result = squash(open_view(paths), place / "diff", verify=True)
    assert result.written.shared == 4 * MIB - PAGE and result.written.copied == 2 * PAGE
    assert (place / "diff").read_bytes() == overlay_oracle(size, [one, other])
    shutil.rmtree(place)


@pytest.mark.parametrize("kind", ["btrfs", "xfs", "ext4"])
@pytest.mark.parametrize("harm", ["zeros became holes", "holes became zeros"])
def test_the_extents_are_those_of_seals(
    filesystem: Callable[[str], Path], kind: str, harm: str
) -> None:
    place = filesystem(kind)
    size = 8 * MIB
    zeros, data = [(2 * MIB, bytes(2 * MIB))], pages(1, [1500])
    paths = write_chain(place, size, [[(0, signed(0, 0, size))], zeros + data])
    seal_layer(paths[1])
    content = paths[1].read_bytes()
    if harm == "zeros became holes":
        write_layer(paths[1], size, data)
    else:
        write_layer(paths[1], size, [(0, content)])
    assert data_of(paths[1]) != joined(zeros, data)
    with open_chain(paths[0], [paths[1]]).view as view:
        result = squash(view, place / "diff", verify=True)
        expected = view.read(0, size)
    assert data_of(place / "diff") == joined(zeros, data)
    assert result.written.shared == 0
    assert open_chain(paths[0], [place / "diff"]).view.read(0, size) == expected
    shutil.rmtree(place)


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


def test_a_filesystem_with_a_coarse_grain_is_refused(
    layers: list[Path], filesystem: Callable[[str], Path]
) -> None:
    place = filesystem("xfs16k")
    with pytest.raises(UntrustedExtentsError, match="coarser than the guest page"):
        squash(open_view(layers), place / "diff")
    with pytest.raises(UntrustedExtentsError, match="its filesystem reports"):
        squash(open_view(layers), place / "diff", policy=TrustPolicy(trust_grain={"all"}))
    assert os.listdir(place) == []


def test_extents_that_do_not_fit_the_output_are_refused(tmp_path: Path, out: Path) -> None:
    # Vouched for where they lie, in units smaller than the output's blocks.
    base = write_layer(tmp_path / "base", SIZE, pages(0, range(64)))
    diff = write_layer(tmp_path / "diff", SIZE, [])
    view = open_view([base, diff])
    view.layers[1].extents = ExtentList([(512, 1024)])
    with pytest.raises(UntrustedExtentsError, match="512 bytes in 1 extents were written, but"):
        squash(view, out)
    assert os.listdir(out.parent) == []


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
