"""A push: its pieces, which of its ranges were requested, and how its pages get to the kernel."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmergefs.core.errors import MountFailedError
from diffmergefs.core.extents import Extent, ExtentList
from diffmergefs.fuse.access import Access
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.opening.images import open_chain
from diffmergefs.prefetch.push import PIECE, Notify, Push, limited, pieces
from diffmergefs.prefetch.recorder import first_touches
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.restores import RUNS

LAYERS = [[(0, signed(0, 0, 4 * PAGE))], [(PAGE, signed(1, PAGE, PAGE))]]
ORACLE = overlay_oracle(4 * PAGE, LAYERS)
WANTED = [Extent(PAGE // 2, 2 * PAGE), Extent(3 * PAGE, 4 * PAGE)]


@pytest.fixture
def push(tmp_path: Path) -> Push:
    base, diff = (write_layer(tmp_path / str(n), 4 * PAGE, layer) for n, layer in enumerate(LAYERS))
    return Push(OpenImage.of(open_chain(base, [diff]).view, "memory", Access(0, 0, 0o400)), 42)


@pytest.mark.parametrize(
    ("requests", "hits"),
    [
        ([], 2500),
        ([(0, 1000)], 2500),  # ends where the first begins
        ([(2000, 3000)], 2500),  # between the two
        ([(1999, 1)], 1500),
        ([(5000, 1), (6000, 100)], 1000),
        ([(1500, 4000)], 0),
    ],
)
def test_a_range_that_no_reader_requested_is_a_hit(
    push: Push, requests: list[tuple[int, int]], hits: int
) -> None:
    push.note(0, 1 << 40)  # before the ranges are known: it cannot be counted
    push.wanted = ExtentList([(1000, 2000), (5000, 6500)])
    for offset, length in requests:
        push.note(offset, length)
    assert push.hit_bytes() == 0
    push.whole = True
    assert push.hit_bytes() == hits


def test_notify_gives_the_kernel_the_merged_bytes_of_each_range(push: Push) -> None:
    calls: list[tuple[int, int, bytes]] = []
    notify = Notify(lambda inode, offset, data: calls.append((inode, offset, bytes(data))))
    assert list(notify.populate(push, WANTED)) == [stop - start for start, stop in WANTED]
    assert calls == [(42, start, ORACLE[start:stop]) for start, stop in WANTED]
    assert not notify.is_own(1)


def test_a_cancelled_push_gives_nothing_more(push: Push) -> None:
    calls: list[int] = []
    notify = Notify(lambda inode, offset, data: calls.append(offset))
    for _ in notify.populate(push, WANTED):
        push.cancelled = True
    assert calls == [WANTED[0].start]


def test_nothing_is_given_once_nobody_guards_the_readers(push: Push) -> None:
    calls: list[int] = []
    guarded = [True, False]
    notify = Notify(lambda inode, offset, data: calls.append(offset), lambda: guarded.pop(0))
    with pytest.raises(MountFailedError, match="the keeper is gone"):
        list(notify.populate(push, WANTED))
    assert calls == [WANTED[0].start]


def test_no_more_than_a_quarter_is_kept() -> None:
    ranges = [Extent(8 * PAGE, 11 * PAGE), Extent(0, 2 * PAGE), Extent(3 * PAGE, 4 * PAGE)]
    assert limited(ranges, 64 * PAGE) == ranges
    assert limited(ranges, 19 * PAGE) == [(8 * PAGE, 11 * PAGE), (0, PAGE)]
    assert limited(ranges, 3 * PAGE) == []


def test_pieces_are_joined_within_blocks_in_the_order_of_their_first_touch() -> None:
    ranges = [
        Extent(PIECE + 3 * PAGE, PIECE + 4 * PAGE),
        Extent(PAGE, 2 * PAGE),
        Extent(PIECE, PIECE + 3 * PAGE),
        Extent(3 * PIECE - PAGE, 5 * PIECE + PAGE),
    ]
    assert pieces(ranges, 512 << 20) == [
        (PIECE, PIECE + 4 * PAGE),
        (PAGE, 2 * PAGE),
        (3 * PIECE - PAGE, 3 * PIECE),
        (3 * PIECE, 4 * PIECE),
        (4 * PIECE, 5 * PIECE),
        (5 * PIECE, 5 * PIECE + PAGE),
    ]


@given(RUNS, st.integers(0, 5000))
def test_pieces_hold_just_the_quarter_touched_first(runs: list[Extent], more: int) -> None:
    size = 64 * 50 * PAGE + more
    scaled = [Extent(start * 50 * PAGE, min(stop * 50 * PAGE, size)) for start, stop in runs]
    ranges = first_touches(scaled)
    found = pieces(ranges, size)
    assert all(0 < stop - start <= PIECE and start % PAGE == 0 for start, stop in found)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(sorted(found)))
    kept = limited(ranges, size)
    wanted = {page for start, stop in kept for page in range(start, stop, PAGE)}
    assert {page for start, stop in found for page in range(start, stop, PAGE)} == wanted
    assert len(wanted) * PAGE <= size // 4
