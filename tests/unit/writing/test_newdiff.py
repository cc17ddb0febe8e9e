"""A new diff: which bytes it has, that just those are data, and when it gets its name."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.errors import (
    LayerChangedError,
    NoSpaceError,
    OutputRefusedError,
    UntrustedExtentsError,
    VerificationError,
)
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing import newdiff
from diffmergefs.writing.newdiff import NewDiff, WrittenDiff
from tests.support.fiemap import without_map
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.layers import poke
from tests.support.newdiffs import assert_sealed, data_of
from tests.support.randomchains import open_view, write_chain
from tests.support.stores import pages

MIB = 1 << 20
SIZE = 64 * PAGE
BASE = pages(0, range(32))
DIFF = [*pages(1, [2, 20]), (4 * PAGE, bytes(PAGE))]
IMAGE = overlay_oracle(SIZE, [BASE, DIFF])
#: A page of each layer, one of written zeros, and the rest of the image, which is a hole.
PUT = [ExtentList([(PAGE, 3 * PAGE), (4 * PAGE, 5 * PAGE)]), ExtentList([(31 * PAGE, SIZE)])]
DATA = [(start, stop) for extents in PUT for start, stop in extents]


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[list[Path]]:
    (tmp_path / "in").mkdir()
    paths = write_chain(tmp_path / "in", SIZE, [BASE, DIFF])
    with unchanged(paths):
        yield paths


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "diff"


def written(
    out: Path,
    source: MergedView,
    put: Sequence[ExtentList] = PUT,
    progress: Callable[[int], None] = lambda count: None,
    *,
    seal: bool = False,
    check: Callable[[Layer], None] = lambda layer: None,
    **options: Any,
) -> WrittenDiff:
    with NewDiff(out, source, **options) as diff:
        for extents in put:
            diff.put(extents, progress)
        return diff.publish(seal=seal, check=check)


def test_what_was_put_is_data_with_the_bytes_of_the_source_and_all_else_a_hole(
    layers: list[Path], out: Path
) -> None:
    done: list[int] = []
    found = written(out, open_view(layers), progress=done.append)
    count = sum(stop - start for start, stop in DATA)
    assert found == WrittenDiff(
        SIZE, count, extents=3, copied=count, shared=0, dense=False, overridden=()
    )
    assert sum(done) == count
    assert data_of(out) == DATA
    content = out.read_bytes()
    assert len(content) == SIZE
    for start, stop in DATA:
        assert content[start:stop] == IMAGE[start:stop]


def test_nothing_put_is_a_diff_without_data_and_everything_is_a_dense_one(
    layers: list[Path], out: Path
) -> None:
    found = written(out, open_view(layers), [])
    assert (found.size, found.data_bytes, found.extents, found.dense) == (SIZE, 0, 0, False)
    assert data_of(out) == []
    found = written(out, open_view(layers), [ExtentList([(0, SIZE)])], force=True)
    assert (found.data_bytes, found.extents, found.dense) == (SIZE, 1, True)
    assert out.read_bytes() == IMAGE


def test_it_has_a_name_only_once_it_is_published(layers: list[Path], out: Path) -> None:
    with NewDiff(out, open_view(layers)) as diff:
        diff.put(PUT[0])
        assert not out.exists()
    assert os.listdir(out.parent) == []


def test_the_check_gets_the_file_as_a_layer_and_may_refuse_it(
    layers: list[Path], out: Path
) -> None:
    def check(layer: Layer) -> None:
        assert not out.exists()
        assert list(layer.extents) == DATA
        assert MergedView([layer]).read(PAGE, 2 * PAGE) == IMAGE[PAGE : 3 * PAGE]
        raise VerificationError("as the check found")

    with pytest.raises(VerificationError, match="as the check found"):
        written(out, open_view(layers), check=check)
    assert os.listdir(out.parent) == []


# Law 4, and the proof


@pytest.mark.parametrize("lost", ["a page of zeros", "a hole"])
def test_a_filesystem_that_does_not_keep_what_was_written_is_found_out(
    layers: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    # As ZFS stores zeros, and as a preallocating filesystem would fill holes.
    real = sparse.data_extents
    view = open_view(layers)

    def untrue(fd: int, size: int) -> Iterator[Any]:
        found = list(real(fd, size))
        if len(found) > 1:
            found = found[:-1] if lost == "a page of zeros" else [(0, SIZE)]
        return iter(found)

    monkeypatch.setattr(sparse, "data_extents", untrue)
    without_map(monkeypatch)
    reported = 3 * PAGE if lost == "a page of zeros" else SIZE
    with pytest.raises(UntrustedExtentsError) as caught:
        written(out, view)
    assert caught.value.check in ("filesystem", "blocks")
    assert f"{reported} " in str(caught.value)
    assert os.listdir(out.parent) == []


def test_extents_that_do_not_fit_the_output_are_refused(tmp_path: Path, out: Path) -> None:
    # Smaller than the blocks of the output, as where a base lies on another filesystem.
    source = open_view([write_layer(tmp_path / "base", SIZE, BASE)])
    with pytest.raises(UntrustedExtentsError, match="512 bytes in 1 extent were written, but"):
        written(out, source, [ExtentList([(512, 1024)])])
    assert os.listdir(out.parent) == []


def test_trust_grain_overrides_a_check_and_a_line_says_so(
    layers: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "diffmergefs.opening.trust.untrusted_filesystem", lambda fd: "it is on exoticfs"
    )
    with pytest.raises(UntrustedExtentsError, match="exoticfs"):
        NewDiff(out, open_view(layers)).__enter__()
    (line,) = written(out, open_view(layers), policy=TrustPolicy(trust_grain={"all"})).overridden
    assert line.startswith("--trust-grain overrides the check of filesystem: ")
    assert str(out) in line
    assert data_of(out) == DATA


# The output


def test_it_replaces_no_input_and_another_file_only_with_force(
    layers: list[Path], tmp_path: Path, out: Path
) -> None:
    other = write_layer(tmp_path / "in" / "other", SIZE, [])
    inputs = [Layer.open(str(other))]
    for path in (*layers, other):
        with pytest.raises(OutputRefusedError, match="is a layer of the image itself"):
            written(path, open_view(layers), inputs=inputs, force=True)
    out.write_text("mine")
    with pytest.raises(OutputRefusedError, match="--force"):
        written(out, open_view(layers))
    assert out.read_text() == "mine"
    written(out, open_view(layers), force=True)
    assert data_of(out) == DATA


def test_the_seal_of_the_old_file_goes_or_is_made_anew(layers: list[Path], out: Path) -> None:
    beside = Path(f"{out}.bmap")
    beside.write_text("stale")
    written(out, open_view(layers))
    assert os.listdir(out.parent) == ["diff"]
    beside.write_text("stale")
    written(out, open_view(layers), force=True, seal=True)
    assert_sealed(out, DATA)


def test_the_mode_is_the_newest_layers_without_what_another_input_withholds(
    tmp_path: Path, out: Path
) -> None:
    base, diff = write_chain(tmp_path, SIZE, [BASE, DIFF])
    diff.chmod(0o664)
    for mode, expected in [(0o644, 0o664), (0o640, 0o660), (0o400, 0o620)]:
        base.chmod(mode)
        written(out, open_view([diff]), inputs=[Layer.open(str(base))], force=True)
        assert stat.S_IMODE(out.stat().st_mode) == expected


@pytest.mark.parametrize("which", [0, 1])
def test_an_input_that_changes_meanwhile_leaves_nothing(
    tmp_path: Path, out: Path, which: int
) -> None:
    paths = write_chain(tmp_path, SIZE, [BASE, DIFF])
    with pytest.raises(LayerChangedError, match=f"00{which}.mem"):
        written(out, open_view(paths), progress=lambda done: poke(paths[which], 0, b"x"))
    assert os.listdir(out.parent) == []


def test_missing_space_is_reported_before_it_runs_out(
    layers: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffmergefs.writing.copying.free_bytes", lambda fd: 3 * PAGE - 1)
    numbers = f"{3 * PAGE} bytes must be written, but {3 * PAGE - 1} are free"
    with pytest.raises(NoSpaceError, match=numbers):
        written(out, open_view(layers))
    assert os.listdir(out.parent) == []


# Shared blocks


class Cloning:
    """Stands in for clone_ranges: it copies, and notes what it was asked for."""

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.asked: list[tuple[str, int, int]] = []

    def __call__(
        self, layers: Sequence[Layer], segments: Sequence[tuple[int, int, int]], target: Any
    ) -> int:
        ((start, stop, number),) = segments
        layer = layers[number]
        name = os.path.basename(layer.path)
        self.asked.append((name, start, stop))
        if name in self.refused:
            return 0
        os.pwrite(target.fd, os.pread(layer.fd, stop - start, start), start)
        return 1


LARGE = [
    [(0, signed(0, 0, 8 * MIB))],
    [(2 * MIB, signed(1, 2 * MIB, MIB)), (4 * MIB, signed(1, 4 * MIB, MIB - PAGE))],
]


@pytest.mark.parametrize("refused", [(), ("000.mem",)])
def test_large_segments_are_shared_and_a_layer_that_cannot_be_is_asked_once(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...]
) -> None:
    view = open_view(write_chain(tmp_path, 8 * MIB, LARGE))
    monkeypatch.setattr(newdiff, "clone_ranges", cloning := Cloning(*refused))
    done: list[int] = []
    found = written(out, view, [ExtentList([(0, 8 * MIB)])], done.append)
    of_the_diff = [("001.mem", 2 * MIB, 3 * MIB)]
    rest = [("000.mem", 3 * MIB, 4 * MIB), ("000.mem", 5 * MIB - PAGE, 8 * MIB)]
    first = ("000.mem", 0, 2 * MIB)
    assert cloning.asked == [first, *of_the_diff, *([] if refused else rest)]
    # The rest of what the diff has is too small.
    assert found.shared == (MIB if refused else 7 * MIB + PAGE)
    assert found.copied == 8 * MIB - found.shared and sum(done) == 8 * MIB
    assert out.read_bytes() == overlay_oracle(8 * MIB, LARGE)


def test_blocks_that_may_be_holes_are_not_shared(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared hole would be a hole in the diff too."""
    monkeypatch.setattr(newdiff, "clone_ranges", cloning := Cloning())
    walk = sparse.walk
    preallocated = ExtentList([(0, PAGE)])
    for field in ("unwritten", "unmapped"):
        path = write_layer(tmp_path / field, 2 * MIB, [(0, signed(0, 0, 2 * MIB))])
        with monkeypatch.context() as patch:
            patch.setattr(
                sparse,
                "walk",
                lambda fd, size, field=field: walk(fd, size)._replace(**{field: preallocated}),
            )
            view = open_view([path])
        found = written(out, view, [ExtentList([(0, 2 * MIB)])], force=True)
        assert (found.copied, found.shared, cloning.asked) == (2 * MIB, 0, [])
