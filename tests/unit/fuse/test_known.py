"""What a journal says: the last record of each thing counts, however often each comes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.fuse.access import Access
from diffmergefs.fuse.arena import Place
from diffmergefs.fuse.known import HandleFacts, ImageFacts, ImageNode, Known
from diffmergefs.fuse.nodes import TagFolder

PLACE = Place(4096, 10)
FOLDER = TagFolder("a", 1, 2)
IMAGE = ImageFacts("memory", Access(0, 0, 0o400), 5, 6, "a", None, (1, 2), PLACE)
OPENED = HandleFacts(image=3)
FACTS: Any = "facts"

RECORDS: list[tuple[Any, ...]] = [
    ("tuned", 128),
    ("fresh", 30),
    ("source", 11),
    ("look", PLACE),
    ("layer", 1, 5, PLACE),
    ("facts", 1, FACTS),
    ("image", 3, IMAGE),
    ("lookups", 7, FOLDER, 1),
    ("lookups", 7, None, 2),
    ("lookups", 8, ImageNode(3), 1),
    ("content", 9, FOLDER, (b"x",)),
    ("opened", 4, OPENED),
]


def facts(known: Known) -> dict[str, object]:
    return vars(known)


def test_all_that_a_journal_says_is_known() -> None:
    assert facts(Known(iter(RECORDS))) == {
        "readahead": 128,
        "fresh": 30,
        "source": 11,
        "look": PLACE,
        "layers": {1: (5, PLACE)},
        "facts": {1: FACTS},
        "images": {3: IMAGE},
        "nodes": {7: (FOLDER, 2), 8: (ImageNode(3), 1)},
        "contents": {9: (FOLDER, (b"x",))},
        "opened": {4: OPENED},
    }
    assert facts(Known([])) == {
        **dict.fromkeys(("readahead", "look")),
        **dict.fromkeys(("fresh", "source"), 0),
        **{name: {} for name in ("layers", "facts", "images", "nodes", "contents", "opened")},
    }


def test_what_is_gone_or_closed_or_forgotten_is_not_known() -> None:
    gone = [("gone", 1), ("gone", 3), ("closed", 4), ("lookups", 7, None, 0)]
    known = Known([*RECORDS, *gone])
    assert not known.layers and not known.facts and not known.images and not known.opened
    assert list(known.nodes) == [8]


def test_records_about_what_is_gone_change_nothing() -> None:
    known = Known([("gone", 1), ("closed", 2), ("lookups", 3, None, 1), ("lookups", 4, None, -1)])
    assert not known.nodes and not known.layers and not known.opened
    assert known.fresh == 5, "no number is used again"


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: str(record[0]))
def test_a_later_record_takes_the_place_of_an_earlier_one(record: tuple[Any, ...]) -> None:
    kind, *rest = record
    known = Known([record, record])
    assert facts(known) == facts(Known([record]))
    assert hasattr(known, f"_{kind}") and rest


def test_fresh_numbers_only_grow() -> None:
    assert Known([("fresh", 30), ("fresh", 20)]).fresh == 30
    assert Known([("fresh", 30), ("lookups", 40, FOLDER, 1)]).fresh == 41


@settings(deadline=None)
@given(st.lists(st.sampled_from([*RECORDS, ("gone", 3), ("closed", 4), ("lookups", 7, None, 0)])))
def test_each_record_may_come_twice(records: list[tuple[Any, ...]]) -> None:
    twice = [record for record in records for _ in range(2)]
    assert facts(Known(twice)) == facts(Known(records))
