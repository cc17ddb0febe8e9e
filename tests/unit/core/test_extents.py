"""The merge rule, on numbers alone: nine overlaps, an oracle of one owner a byte, exact windows."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmergefs.core.extents import MAX_LAYERS, Extent, ExtentList, Segment, SegmentMap

MIB = 1 << 20
LENGTH = 40

Pairs = list[tuple[int, int]]


def merged(*layers: Pairs) -> list[tuple[int, int, int | None]]:
    return [(s.start, s.stop, s.layer) for s in SegmentMap([ExtentList(pairs) for pairs in layers])]


# The drawings show the base's and the diff's extents; a dot is a hole. Each number is 10 bytes.
OVERLAPS: dict[str, tuple[Pairs, Pairs, list[tuple[int, int, int]]]] = {
    # ..0000..
    # ..1111..
    "same": ([(20, 60)], [(20, 60)], [(20, 60, 1)]),
    # 00000000
    # ..1111..
    "inside": ([(0, 80)], [(20, 60)], [(0, 20, 0), (20, 60, 1), (60, 80, 0)]),
    # ..0000..
    # 1111....
    "head": ([(20, 60)], [(0, 40)], [(0, 40, 1), (40, 60, 0)]),
    # ..0000..
    # ....1111
    "tail": ([(20, 60)], [(40, 80)], [(20, 40, 0), (40, 80, 1)]),
    # .000000.
    # 11....11
    "both": ([(10, 70)], [(0, 20), (60, 80)], [(0, 20, 1), (20, 60, 0), (60, 80, 1)]),
    # ..00....
    # 11111111
    "swallow one": ([(20, 40)], [(0, 80)], [(0, 80, 1)]),
    # .0.00.0.
    # 11111111
    "swallow many": ([(10, 20), (30, 50), (60, 70)], [(0, 80)], [(0, 80, 1)]),
    # 0000....
    # ....1111
    "adjacent": ([(0, 40)], [(40, 80)], [(0, 40, 0), (40, 80, 1)]),
    # 00......
    # ......11
    "hole in all": ([(0, 20)], [(60, 80)], [(0, 20, 0), (60, 80, 1)]),
    # ..0000..
    # ........
    "empty diff": ([(20, 60)], [], [(20, 60, 0)]),
    "nothing at all": ([], [], []),
    # 0000.... and a diff that begins where the base's extent ends and another within it
    "ends meet": ([(0, 20), (40, 60)], [(20, 40)], [(0, 20, 0), (20, 40, 1), (40, 60, 0)]),
    "straddles 1 MiB": (
        [(0, 2 * MIB)],
        [(MIB - 4096, MIB + 4096)],
        [(0, MIB - 4096, 0), (MIB - 4096, MIB + 4096, 1), (MIB + 4096, 2 * MIB, 0)],
    ),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_a_diff_lies_over_its_base(case: str) -> None:
    base, diff, expected = OVERLAPS[case]
    assert merged(base, diff) == expected


def test_neighbours_of_one_layer_are_one_segment_though_an_older_one_changes_below() -> None:
    assert merged([(10, 20), (30, 40)], [(0, 15), (15, 50)]) == [(0, 50, 1)]


def test_a_middle_layer_shows_only_where_no_newer_one_has_data() -> None:
    found = merged([(0, 100)], [(20, 80)], [(30, 40), (60, 90)])
    assert found == [
        (0, 20, 0),
        (20, 30, 1),
        (30, 40, 2),
        (40, 60, 1),
        (60, 90, 2),
        (90, 100, 0),
    ]


def test_a_window_holds_holes_and_is_cut_at_its_borders() -> None:
    segments = SegmentMap([ExtentList([(10, 30)]), ExtentList([(20, 50), (70, 80)])])
    assert list(segments.window(15, 75)) == [
        Segment(15, 20, 0),
        Segment(20, 50, 1),
        Segment(50, 70, None),
        Segment(70, 75, 1),
    ]
    assert list(segments.window(0, 10)) == [Segment(0, 10, None)]
    assert list(segments.window(80, 1000)) == [Segment(80, 1000, None)]
    assert list(segments.window(20, 50)) == [Segment(20, 50, 1)]
    assert list(segments.window(30, 30)) == []


def extent_lists() -> st.SearchStrategy[ExtentList]:
    # From one flag a byte: adjacent extents, single bytes and full layers all come up.
    return st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH).map(extents_of)


def extents_of(flags: list[bool]) -> ExtentList:
    return ExtentList((n, n + 1) for n, flag in enumerate(flags) if flag)


def bytes_of(extents: ExtentList) -> set[int]:
    return {byte for start, stop in extents for byte in range(start, stop)}


def owners(layers: list[ExtentList]) -> list[int | None]:
    """The oracle: for each byte, the newest layer that has data there."""
    found: list[int | None] = [None] * LENGTH
    for number, extents in enumerate(layers):
        for byte in bytes_of(extents):
            found[byte] = number
    return found


@given(st.lists(extent_lists(), max_size=6), st.integers(0, LENGTH), st.integers(0, LENGTH))
def test_every_window_is_tiled_exactly_as_the_owner_of_each_byte_says(
    layers: list[ExtentList], start: int, stop: int
) -> None:
    segments = [Segment(*s) for s in SegmentMap(layers).window(start, stop)]
    expected = owners(layers)
    assert all(segment.start < segment.stop for segment in segments)
    assert all(one.stop == two.start and one.layer != two.layer for one, two in pairwise(segments))
    told = [(byte, s.layer) for s in segments for byte in range(s.start, s.stop)]
    assert told == [(byte, expected[byte]) for byte in range(start, stop)]


@given(st.lists(extent_lists(), max_size=6))
def test_iterating_gives_the_same_segments_without_the_holes(layers: list[ExtentList]) -> None:
    segments = SegmentMap(layers)
    whole = [s for s in segments.window(0, LENGTH) if s[2] is not None]
    assert list(segments) == whole


@given(st.lists(extent_lists(), max_size=6), extent_lists())
def test_a_newer_layer_over_a_merge_is_the_merge_of_all(
    layers: list[ExtentList], newer: ExtentList
) -> None:
    below = SegmentMap(layers)
    before = list(below)
    merged, expected = below.under(newer, len(layers)), SegmentMap([*layers, newer])
    assert (merged._starts, merged._owners) == (expected._starts, expected._owners)
    assert list(below) == before


@given(st.lists(extent_lists(), max_size=6))
def test_each_layer_owns_the_bytes_of_its_segments(layers: list[ExtentList]) -> None:
    found = owners(layers)
    expected = [found.count(number) for number in range(len(layers))]
    assert SegmentMap(layers).owned_bytes(len(layers)) == expected


@given(extent_lists(), extent_lists())
def test_outside_is_exactly_what_the_other_has_not(one: ExtentList, other: ExtentList) -> None:
    found = ExtentList(one.outside(other))
    assert bytes_of(found) == bytes_of(one) - bytes_of(other)


def test_outside_in_between_and_around() -> None:
    two = ExtentList([(10, 20), (30, 40)])
    assert list(ExtentList([(0, 50)]).outside(two)) == [(0, 10), (20, 30), (40, 50)]
    assert list(two.outside(ExtentList([(10, 19), (30, 40)]))) == [(19, 20)]
    assert list(two.outside(two)) == list(ExtentList().outside(two)) == []
    assert list(two.outside(ExtentList())) == [(10, 20), (30, 40)]


@given(extent_lists(), extent_lists())
def test_the_intersection_is_what_is_data_in_both(a: ExtentList, b: ExtentList) -> None:
    assert bytes_of(a.intersection(b)) == bytes_of(a) & bytes_of(b)
    assert a.intersection(b) == b.intersection(a)


def test_a_thousand_layers_are_merged_and_one_more_is_refused() -> None:
    layers = [ExtentList([(n, n + 1)]) for n in range(MAX_LAYERS)]
    assert MAX_LAYERS == 1000
    assert list(SegmentMap(layers)) == [Segment(n, n + 1, n) for n in range(MAX_LAYERS)]
    stacked = [ExtentList([(0, MAX_LAYERS - n)]) for n in range(MAX_LAYERS)]
    assert list(SegmentMap(stacked)) == [
        Segment(n, n + 1, MAX_LAYERS - 1 - n) for n in range(MAX_LAYERS)
    ]
    with pytest.raises(ValueError, match="1001 layers; at most 1000"):
        SegmentMap([*layers, ExtentList()])


def test_offsets_up_to_8_eib_are_merged_exactly() -> None:
    top = 2**63 - 1
    assert merged([(0, top)], [(top - 1, top)]) == [(0, top - 1, 0), (top - 1, top, 1)]


def test_extents_are_joined_where_they_touch() -> None:
    extents = ExtentList([(0, 10), (10, 20), (30, 40)])
    assert list(extents) == [Extent(0, 20), Extent(30, 40)]
    assert len(extents) == 2
    assert extents.data_bytes == 30


@pytest.mark.parametrize(
    "pairs",
    [[(5, 5)], [(6, 5)], [(-1, 5)], [(0, 10), (9, 20)], [(10, 20), (0, 5)], [(0, 10), (0, 10)]],
)
def test_an_empty_overlapping_or_unordered_extent_is_refused(pairs: Pairs) -> None:
    with pytest.raises(ValueError, match="empty or out of order"):
        ExtentList(pairs)


@pytest.mark.parametrize(
    ("pairs", "covered"),
    [
        ([(0, 100)], True),
        ([(0, 50), (50, 100)], True),
        ([(0, 99)], False),
        ([(1, 100)], False),
        ([(0, 40), (41, 100)], False),
        ([], False),
    ],
)
def test_covers_means_no_hole(pairs: Pairs, covered: bool) -> None:
    assert ExtentList(pairs).covers(100) is covered


def test_extents_compare_by_value_and_are_not_hashable() -> None:
    assert ExtentList([(0, 1)]) == ExtentList([(0, 1)])
    assert ExtentList([(0, 1)]) != ExtentList([(0, 2)])
    assert ExtentList([(0, 2)]) != ExtentList([(1, 2)])
    assert ExtentList() != []
    with pytest.raises(TypeError):
        hash(ExtentList())


def test_a_segment_takes_ten_bytes_at_rest() -> None:
    segments = SegmentMap([ExtentList((2 * n, 2 * n + 1) for n in range(1000))])
    # 1,000 extents and the 1,000 holes after them.
    assert len(segments) == 2000
    assert segments.nbytes == 2000 * 10
