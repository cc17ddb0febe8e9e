"""The merged view: right bytes for every window, and no byte asked that is not needed."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.core.errors import BrokenChainError, SizeMismatchError
from diffmergefs.core.extents import ExtentList, Segment, SegmentMap
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import HOLE, MergedView
from tests.support.asked import asked
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.subjects.view import Extents, data, open_view

__all__ = ["asked"]

MIB = 1 << 20


@st.composite
def chains(draw: st.DrawFn) -> tuple[int, list[Extents]]:
    """A size, often odd, and a base with up to six diffs: signed pages, and pages of zeros."""
    size = draw(st.integers(1, 12 * PAGE))
    pages = -(-size // PAGE)
    kinds = st.lists(st.sampled_from(["hole", "data", "zeros"]), min_size=pages, max_size=pages)
    chain = []
    for layer in range(draw(st.integers(1, 7))):
        extents = []
        for page, kind in enumerate(draw(kinds)):
            start, length = page * PAGE, min(PAGE, size - page * PAGE)
            if kind != "hole":
                content = signed(layer, start, length) if kind == "data" else bytes(length)
                extents.append((start, content))
        chain.append(extents)
    return size, chain


@settings(deadline=None, max_examples=60)
@given(chains(), st.data())
def test_every_window_of_every_chain_reads_as_the_diffs_laid_one_after_another(
    case: tuple[int, list[Extents]], draws: st.DataObject
) -> None:
    size, chain = case
    oracle = overlay_oracle(size, chain)
    with tempfile.TemporaryDirectory() as name, open_view(Path(name), size, chain) as view:
        with unchanged(Path(name).iterdir()):
            assert view.read(0, size) == oracle
            for _ in range(5):
                offset = draws.draw(st.integers(0, size + PAGE))
                length = draws.draw(st.integers(0, size + PAGE))
                expected = oracle[offset : offset + length]
                assert view.read(offset, length) == expected
                # In the page cache, as it was just read; None is right all the same.
                assert view.read_nowait(offset, length) in (expected, None)
        visible = view.visible_bytes()
        for number in range(len(chain)):
            shown = sum(s.stop - s.start for s in view.segments() if s.layer == number)
            assert visible[number] == shown
        held, found = bytearray(size), bytearray(size)
        for start, content in itertools.chain.from_iterable(chain):
            held[start : start + len(content)] = b"\1" * len(content)
        for start, stop in view.data_extents():
            found[start:stop] = b"\1" * (stop - start)
        assert found == held


# Pages that each layer holds, then what a read of [offset, length) must ask: (layer, offset,
# length), in pages. The read is of the whole image of 8 pages unless the case says otherwise.
READS: dict[str, tuple[list[list[tuple[int, int]]], list[tuple[int, int, int]]]] = {
    "same": ([[(2, 4)], [(2, 4)]], [(1, 2, 4)]),
    "inside": ([[(0, 8)], [(2, 4)]], [(0, 0, 2), (1, 2, 4), (0, 6, 2)]),
    "head": ([[(2, 4)], [(0, 4)]], [(1, 0, 4), (0, 4, 2)]),
    "tail": ([[(2, 4)], [(4, 4)]], [(0, 2, 2), (1, 4, 4)]),
    "both": ([[(1, 6)], [(0, 2), (6, 2)]], [(1, 0, 2), (0, 2, 4), (1, 6, 2)]),
    "swallow one": ([[(2, 2)], [(0, 8)]], [(1, 0, 8)]),
    "swallow many": ([[(1, 1), (3, 2), (6, 1)], [(0, 8)]], [(1, 0, 8)]),
    "adjacent": ([[(0, 4)], [(4, 4)]], [(0, 0, 4), (1, 4, 4)]),
    "hole in all": ([[(0, 2)], [(6, 2)]], [(0, 0, 2), (1, 6, 2)]),
    "nothing": ([[], []], []),
    "the middle one only": ([[(0, 8)], [(0, 8)], []], [(1, 0, 8)]),
    "three": (
        [[(0, 8)], [(1, 5)], [(2, 1), (5, 2)]],
        [(0, 0, 1), (1, 1, 1), (2, 2, 1), (1, 3, 2), (2, 5, 2), (0, 7, 1)],
    ),
}


@pytest.mark.parametrize("case", READS)
def test_a_read_asks_each_layer_for_just_what_it_supplies(
    case: str, tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    layers, expected = READS[case]
    chain = [[data(n, *run) for run in runs] for n, runs in enumerate(layers)]
    view = open_view(tmp_path, 8 * PAGE, chain)
    assert asked == []  # opening reads no byte
    assert view.read(0, 8 * PAGE) == overlay_oracle(8 * PAGE, chain)
    assert asked == [(f"{n}.mem", first * PAGE, count * PAGE) for n, first, count in expected]


def test_a_page_of_zeros_in_a_diff_hides_the_base_and_a_hole_does_not(
    tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    view = open_view(tmp_path, 3 * PAGE, [[data(0, 0, 3)], [(PAGE, bytes(PAGE))]])
    assert view.read(PAGE, PAGE) == bytes(PAGE)
    assert asked == [("1.mem", PAGE, PAGE)]
    assert view.read(2 * PAGE, PAGE) == signed(0, 2 * PAGE, PAGE)


def test_requests_that_cut_an_extent_ask_for_their_part_only(
    tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    size = 2 * MIB
    chain = [[data(0, 0, size // PAGE)], [data(1, MIB // PAGE - 1, 2)]]
    view = open_view(tmp_path, size, chain)
    oracle = overlay_oracle(size, chain)
    # Across the diff's start, across the MiB border within it, and from within it to the base.
    for offset, length, expected in [
        (MIB - PAGE - 10, 20, [("0.mem", MIB - PAGE - 10, 10), ("1.mem", MIB - PAGE, 10)]),
        (MIB - 7, 14, [("1.mem", MIB - 7, 14)]),
        (MIB + 1, PAGE, [("1.mem", MIB + 1, PAGE - 1), ("0.mem", MIB + PAGE, 1)]),
    ]:
        asked.clear()
        assert view.read(offset, length) == oracle[offset : offset + length]
        assert asked == expected


def test_a_read_at_or_after_the_end_is_cut_there(tmp_path: Path) -> None:
    size = PAGE + 100
    view = open_view(tmp_path, size, [[(0, signed(0, 0, size))]])
    assert view.read(size - 10, 4096) == signed(0, size - 10, 10)
    assert view.read(size, 4096) == b""
    assert view.read(size + 1, 4096) == b""
    assert view.read(2**62, 4096) == b""
    assert view.read(0, 2**62) == signed(0, 0, size)
    assert view.read(5, 0) == b""


@pytest.mark.parametrize(("offset", "length"), [(-1, 10), (0, -1)])
def test_a_negative_window_is_refused(tmp_path: Path, offset: int, length: int) -> None:
    view = open_view(tmp_path, PAGE, [[]])
    with pytest.raises(ValueError, match="negative window"):
        view.read(offset, length)


def test_segments_tell_the_whole_image_by_default(tmp_path: Path) -> None:
    view = open_view(tmp_path, 4 * PAGE, [[data(0, 0, 2)], [data(1, 1, 1)]])
    assert list(view.segments()) == [
        Segment(0, PAGE, 0),
        Segment(PAGE, 2 * PAGE, 1),
        Segment(2 * PAGE, 4 * PAGE, None),
    ]
    assert list(view.segments(PAGE + 1, 2)) == [Segment(PAGE + 1, PAGE + 3, 1)]
    assert list(view.segments(3 * PAGE, 10 * PAGE)) == [Segment(3 * PAGE, 4 * PAGE, None)]


@pytest.mark.parametrize(
    "refusal",
    [BlockingIOError(errno.EAGAIN, "not cached"), OSError(errno.EOPNOTSUPP, "no RWF_NOWAIT")],
)
def test_read_nowait_is_none_where_it_would_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: OSError
) -> None:
    view = open_view(tmp_path, PAGE, [[data(0, 0, 1)]])
    preadv = os.preadv

    def refuse_nowait(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise refusal
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", refuse_nowait)
    assert view.read_nowait(0, PAGE) is None
    assert view.read(0, PAGE) == signed(0, 0, PAGE)


def test_read_nowait_raises_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = open_view(tmp_path, PAGE, [[data(0, 0, 1)]])

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="bad disk"):
        view.read_nowait(0, PAGE)


def test_read_nowait_leaves_a_layer_with_a_moved_fingerprint_to_read(tmp_path: Path) -> None:
    view = open_view(tmp_path, PAGE, [[data(0, 0, 1)]])
    view.read(0, PAGE)
    (tmp_path / "0.mem").chmod(0o600)
    assert view.read_nowait(0, PAGE) is None
    expected = signed(0, 0, PAGE)
    assert view.read(0, PAGE) == expected and view.read_nowait(0, PAGE) == bytearray(expected)


def test_a_fill_says_who_supplied_how_much_and_goes_on_where_it_could_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, int, int]]
) -> None:
    view = open_view(tmp_path, 6 * PAGE, [[data(0, 0, 3)], [data(1, 1, 1), data(1, 4, 1)]])
    oracle = bytes(view.read(0, 6 * PAGE))
    told = {0: 2 * PAGE - 10, 1: 2 * PAGE, HOLE: PAGE}
    buffer = memoryview(bytearray(b"older" * PAGE))[: 5 * PAGE - 10]
    for fill in (view.fill_nowait, view.fill):
        supplied: dict[int, int] = {}
        buffer[:10] = b"old bytes!"
        assert fill(buffer, 10, supplied) in (len(buffer), None)
        assert (bytes(buffer), supplied) == (oracle[10 : 5 * PAGE], told)

    preadv = os.preadv

    def without_page_4(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT and offset == 4 * PAGE:
            raise BlockingIOError(errno.EAGAIN, "not cached")
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", without_page_4)
    supplied = {}
    done = view.fill_nowait(buffer, 10, supplied)
    assert done == 4 * PAGE - 10
    asked.clear()
    view.fill(buffer, 10, supplied, done)
    assert (bytes(buffer), supplied) == (oracle[10 : 5 * PAGE], told)
    assert asked == [("1.mem", 4 * PAGE, PAGE)]

    # Nothing counts as filled while the fingerprint of a layer that was read has moved.
    (tmp_path / "0.mem").chmod(0o600)
    monkeypatch.setattr(os, "preadv", preadv)
    supplied = {}
    assert (view.fill_nowait(buffer, 10, supplied), supplied) == (0, {})
    view.fill(buffer, 10, supplied)
    assert (bytes(buffer), supplied) == (oracle[10 : 5 * PAGE], told)


def test_a_chain_is_merged_from_the_part_of_it_that_an_open_view_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages, size = range(0, 40, 2), 41 * PAGE
    chain = [[data(0, 0, 41)], [data(1, n, 1) for n in pages], [data(2, n, 1) for n in pages[5:9]]]
    chain += [[data(3, 7, 5)], [data(4, 0, 2), data(4, 40, 1)]]
    whole: list[int] = []
    real = SegmentMap.__init__

    def merging(self: SegmentMap, layers: Sequence[ExtentList]) -> None:
        whole.append(len(layers))
        real(self, layers)

    monkeypatch.setattr(SegmentMap, "__init__", merging)
    layers = open_view(tmp_path, size, chain).layers
    views = [MergedView(layers[:depth]) for depth in (3, 5, 4, 5, 2)]
    for view in views:
        assert view.read(0, size) == overlay_oracle(size, chain[: len(view.layers)])
    # Three are merged anew, and two, of which no view knows more than a little; the others are
    # those three with a layer or two over them, or the very same.
    assert [count for count in whole if count] == [3, 2]
    assert views[1]._map is views[3]._map
    # Once no view uses them, nothing holds a layer open.
    fds = [layer.fd for layer in layers]
    del views, view, layers
    gc.collect()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_size_mismatch_names_both_files_and_both_sizes(tmp_path: Path) -> None:
    layers = [
        Layer.open(str(write_layer(tmp_path / name, size, [])))
        for name, size in [("base.mem", 2 * PAGE), ("one.mem", 2 * PAGE), ("two.mem", PAGE)]
    ]
    with pytest.raises(SizeMismatchError) as caught:
        MergedView(layers)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/two.mem: {PAGE} bytes, ")
    assert f"{tmp_path}/base.mem has {2 * PAGE}" in text
    assert "\n" not in text


def test_a_chain_of_a_thousand_layers_reads_right_and_no_more_are_taken(tmp_path: Path) -> None:
    size = 1000 * PAGE
    base = Layer.open(str(write_layer(tmp_path / "base", size, [data(0, 0, 1000)])))
    diff = Layer.open(str(write_layer(tmp_path / "diff", size, [data(1, 7, 1)])))
    top = Layer.open(str(write_layer(tmp_path / "top", size, [data(2, 8, 1)])))
    view = MergedView([base, *[diff] * 998, top])
    expected = signed(0, 6 * PAGE, PAGE) + signed(1, 7 * PAGE, PAGE) + signed(2, 8 * PAGE, PAGE)
    assert view.read(6 * PAGE, 3 * PAGE) == expected
    for layers in ([], [base, *[diff] * 1000]):
        with pytest.raises(BrokenChainError, match=f"a chain of {len(layers)} layers"):
            MergedView(layers)


def test_the_end_of_the_with_block_closes_the_layers(tmp_path: Path) -> None:
    with open_view(tmp_path, PAGE, [[data(0, 0, 1)], []]) as view:
        descriptors = [layer.fd for layer in view.layers]
    for fd in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def restored(layer: Layer) -> Layer:
    return Layer.restored(layer.facts, os.dup(layer.fd), lambda: layer.all_extents)


def test_another_process_may_go_on_with_a_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, chain = 4 * PAGE, [[data(0, 0, 4)], [data(1, 1, 1)], [data(2, 3, 1)]]
    loads: list[str] = []
    with open_view(tmp_path, size, chain) as view:
        merged = pickle.loads(pickle.dumps(view.merged))

        def load() -> SegmentMap:
            loads.append("")
            return merged  # type: ignore[no-any-return]

        def fails(*_: object) -> None:
            raise AssertionError("it is merged already")

        layers = [restored(layer) for layer in view.layers]
        monkeypatch.setattr("diffmergefs.core.view.SegmentMap", fails)
        again = MergedView.restored(layers, load)
        assert not loads and (again.layers, again.size) == (tuple(layers), size)
        assert again.read(0, size) == overlay_oracle(size, chain)
        assert list(again.segments()) == list(view.segments())
        # What is opened later on the same layers has that merge too.
        assert list(MergedView(layers).segments()) == list(view.segments())
        assert len(loads) == 1
        with pytest.raises(BrokenChainError):
            MergedView.restored([], load)
        again.close()
