"""Diffs that look as if their holes were filled."""

from __future__ import annotations

from pathlib import Path

from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from tests.support.images import PAGE, signed, write_layer
from tests.support.stores import age, pages, write_tag

MIB = 1 << 20


SIZE = 32 * MIB


BASE = [(0, signed(0, 0, SIZE))]


Extents = list[tuple[int, bytes]]


def hints(base: Path, *diffs: Path, **options: object) -> list[str]:
    return [str(h) for h in open_chain(base, diffs, TrustPolicy(**options)).hints]  # type: ignore[arg-type]


def base_in(directory: Path) -> Path:
    return write_layer(directory / "base", SIZE, BASE)


def zeros(first: int, count: int) -> tuple[int, bytes]:
    return first * PAGE, bytes(count * PAGE)


def folio(first: int, count: int, *stored: int) -> Extents:
    """An extent of zeros with these of its pages stored."""
    return [zeros(first, count), *pages(1, [first + n for n in stored])]


def filled_store(store: Path, count: int) -> list[str]:
    """A chain of so many diffs that look filled, over a base; their tags."""
    write_tag(store, "base", numbers=range(SIZE // PAGE), size=SIZE)
    tags = [f"t{n}" for n in range(count)]
    for n, tag in enumerate(tags):
        write_tag(store, tag, tags[n - 1] if n else "base", layer=n + 1, size=SIZE)
        memory = store / tag / "memory.bin"
        write_layer(memory, SIZE, folio(64 + 1024 * n, 64, 5))
        age(memory)
    return tags
