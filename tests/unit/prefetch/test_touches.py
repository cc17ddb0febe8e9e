"""First touches out of requests: who counts as a restore, each byte once, and what is pushed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmergefs.core.extents import Extent
from diffmergefs.prefetch.touches import PIECE, Touches, first_touches, limited, pieces
from tests.support.images import PAGE

MIB = 1 << 20
SIZE = 512 * MIB


def touched(requests: Sequence[tuple[int, int]], size: int = SIZE) -> Touches:
    touches = Touches(size)
    for offset, length in requests:
        touches.add(offset, length)
    return touches


def in_order(size: int = SIZE, length: int = 128 << 10) -> list[tuple[int, int]]:
    return [(offset, length) for offset in range(0, size, length)]


def random_pages(count: int, size: int = SIZE, seed: int = 1) -> list[tuple[int, int]]:
    dice = random.Random(seed)
    return [(dice.randrange(size // PAGE) * PAGE, PAGE) for _ in range(count)]


def overtaking(requests: Sequence[tuple[int, int]], by: int) -> list[tuple[int, int]]:
    """Each group of so many in a random order, as several workers of a copier make them."""
    dice = random.Random(7)
    groups = [list(requests[n : n + by]) for n in range(0, len(requests), by)]
    for group in groups:
        dice.shuffle(group)
    return [request for group in groups for request in group]


@pytest.mark.parametrize("length", [PAGE, 128 << 10, MIB])
def test_a_reader_in_order_is_no_restore(length: int) -> None:
    touches = touched(in_order(length=length))
    assert not touches.is_restore
    assert list(touches) == [(0, SIZE)]


def test_a_copier_whose_requests_overtake_each_other_is_no_restore() -> None:
    assert not touched(overtaking(in_order(length=MIB), by=8)).is_restore


def test_a_glance_is_no_restore() -> None:
    assert not touched([]).is_restore
    assert not touched([(0, PAGE)]).is_restore
    assert not touched([(0, PAGE), (SIZE - PAGE, PAGE), (SIZE // 2, PAGE)]).is_restore


def test_a_reader_in_order_who_looks_back_now_and_then_is_no_restore() -> None:
    requests = in_order(length=MIB)
    for n in range(500, 0, -25):
        requests.insert(n, (0, PAGE))
    assert not touched(requests).is_restore


@pytest.mark.parametrize("size", [4 * MIB, 16 * MIB, SIZE, 64 << 30])
def test_a_guest_here_and_there_is_a_restore(size: int) -> None:
    assert touched(random_pages(200, size), size).is_restore


def test_a_guest_that_the_kernel_reads_ahead_for_is_a_restore() -> None:
    requests = [(offset // MIB * MIB, 128 << 10) for offset, _ in random_pages(150)]
    assert touched(requests).is_restore


def test_a_guest_that_then_runs_through_a_quarter_of_its_memory_is_a_restore() -> None:
    assert touched(random_pages(300) + in_order(SIZE // 4)).is_restore


def test_requests_are_runs_of_whole_pages_within_the_image() -> None:
    touches = touched([(10, 20), (PAGE, 1), (5 * PAGE, PAGE), (PAGE - 1, 2)], 5 * PAGE + 100)
    assert list(touches) == [(0, 2 * PAGE), (5 * PAGE, 5 * PAGE + 100), (0, 2 * PAGE)]
    assert len(touches) == 3


def test_adding_says_how_many_runs_it_made() -> None:
    touches = Touches(8 * PAGE)
    added = [touches.add(offset * PAGE, PAGE) for offset in (0, 1, 2, 5, 3)]
    assert added == [1, 0, 0, 1, 1]
    assert touches.add(8 * PAGE, PAGE) == 0 and touches.add(0, 0) == 0
    assert len(touches) == 3


# Named by what a later run does to an earlier one.
OVERLAPS = {
    "same": ([(2, 4), (2, 4)], [(2, 4)]),
    "inside": ([(0, 9), (3, 5)], [(0, 9)]),
    "head": ([(4, 8), (2, 6)], [(4, 8), (2, 4)]),
    "tail": ([(4, 8), (6, 9)], [(4, 8), (8, 9)]),
    "both": ([(4, 6), (2, 8)], [(4, 6), (2, 4), (6, 8)]),
    "swallow many": ([(1, 2), (5, 6), (0, 8)], [(1, 2), (5, 6), (0, 1), (2, 5), (6, 8)]),
    "adjacent": ([(4, 6), (2, 4)], [(4, 6), (2, 4)]),
    "none": ([], []),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_a_byte_counts_where_it_came_first(name: str) -> None:
    runs, expected = OVERLAPS[name]
    assert first_touches([Extent(*run) for run in runs]) == expected


_RUNS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda r: Extent(r[0], r[0] + r[1])),
    max_size=30,
)


@given(_RUNS)
def test_first_touches_are_those_of_a_byte_by_byte_walk(runs: list[Extent]) -> None:
    order: dict[int, None] = {}
    for start, stop in runs:
        order.update(dict.fromkeys(range(start, stop)))
    found = [n for start, stop in first_touches(runs) for n in range(start, stop)]
    assert found == list(order)


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
    assert pieces(ranges, SIZE) == [
        (PIECE, PIECE + 4 * PAGE),
        (PAGE, 2 * PAGE),
        (3 * PIECE - PAGE, 3 * PIECE),
        (3 * PIECE, 4 * PIECE),
        (4 * PIECE, 5 * PIECE),
        (5 * PIECE, 5 * PIECE + PAGE),
    ]


@given(_RUNS, st.integers(0, 5000))
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
