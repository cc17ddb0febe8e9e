"""From a snapshot to its chain: following parents down to the base, no file is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from diffmergefs.core.errors import BrokenChainError
from diffmergefs.core.extents import MAX_LAYERS


class Link(Protocol):
    """A snapshot by its tag, with its parent's tag (None for a base)."""

    @property
    def tag(self) -> str: ...

    @property
    def parent(self) -> str | None: ...


L = TypeVar("L", bound=Link)

_NAMED = 8  # tags of a cycle that stand in its message


def resolve(head: str, lookup: Callable[[str], L | None]) -> list[L]:
    """The chain that ends in `head`, base first.

    `lookup` gives the snapshot of a tag, or None. Raises BrokenChainError for a missing parent, a
    cycle and a chain of more than 1,000 layers, naming the tags.
    """
    chain: list[L] = []
    seen: set[str] = set()
    tag: str | None = head
    while tag is not None:
        if tag in seen:
            tags = [link.tag for link in chain]
            raise BrokenChainError(_cycle(tags[tags.index(tag) :]))
        link = lookup(tag)
        if link is None:
            child = chain[-1].tag if chain else None
            of = f"parent '{tag}' of '{child}' is missing" if child else f"no snapshot '{tag}'"
            raise BrokenChainError(of)
        seen.add(tag)
        chain.append(link)
        if len(chain) > MAX_LAYERS:
            raise BrokenChainError(f"the chain has more than {MAX_LAYERS} layers; squash some")
        tag = link.parent
    return chain[::-1]


def _cycle(tags: list[str]) -> str:
    # Each tag's parent follows it; the first is the parent of the last.
    more = [f"{len(tags) - _NAMED} more"] if len(tags) > _NAMED else []
    path = " -> ".join([*tags[:_NAMED], *more, tags[0]])
    return f"cycle: {path}, each followed by its parent; a chain ends in a base"
