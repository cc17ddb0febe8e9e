"""From a tag to its chain: no file, no directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pytest

from diffmergefs.core.errors import BrokenChainError
from diffmergefs.stores.chain import resolve


class Link(NamedTuple):
    tag: str
    parent: str | None


def resolved(head: str, parents: Mapping[str, str | None]) -> list[str]:
    links = {tag: Link(tag, parent) for tag, parent in parents.items()}
    return [link.tag for link in resolve(head, links.get)]


def refusal(head: str, parents: Mapping[str, str | None]) -> str:
    with pytest.raises(BrokenChainError) as caught:
        resolved(head, parents)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_chain_is_base_first_and_holds_nothing_beside_it() -> None:
    parents = {"c": "b", "b": "a", "a": None, "child": "c", "sibling": "a", "broken": "none"}
    assert resolved("c", parents) == ["a", "b", "c"]
    assert resolved("a", parents) == ["a"]
    assert resolved("sibling", parents) == ["a", "sibling"]


def test_a_missing_snapshot_and_a_missing_parent_are_named() -> None:
    assert refusal("x", {}) == "no snapshot 'x'"
    assert refusal("c", {"c": "b", "b": "gone"}) == "parent 'gone' of 'b' is missing"


def test_an_empty_tag_as_parent_is_missing_and_no_end_of_the_chain() -> None:
    assert refusal("a", {"a": ""}) == "parent '' of 'a' is missing"


@pytest.mark.parametrize(
    ("parents", "cycle"),
    [
        ({"a": "a"}, "a -> a"),
        ({"a": "b", "b": "c", "c": "a"}, "a -> b -> c -> a"),
        ({"a": "b", "b": "c", "c": "b"}, "b -> c -> b"),
    ],
)
def test_a_cycle_is_told_without_the_way_to_it(parents: dict[str, str | None], cycle: str) -> None:
    assert f"cycle: {cycle}, " in refusal("a", parents)


def test_a_cycle_of_hundreds_is_told_in_a_short_line() -> None:
    parents: dict[str, str | None] = {f"t{n}": f"t{(n + 1) % 500}" for n in range(500)}
    expected = " -> ".join([*(f"t{n}" for n in range(8)), "492 more", "t0"])
    assert refusal("t0", parents) == (
        f"cycle: {expected}, each followed by its parent; a chain ends in a base"
    )


@pytest.mark.parametrize("depth", [1000, 1001])
def test_a_chain_has_at_most_a_thousand_layers(depth: int) -> None:
    parents: dict[str, str | None] = {"0": None} | {str(n): str(n - 1) for n in range(1, depth)}
    head = str(depth - 1)
    if depth == 1000:
        assert resolved(head, parents) == [str(n) for n in range(depth)]
    else:
        assert "more than 1000 layers" in refusal(head, parents)
