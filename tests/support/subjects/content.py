"""A store of dense links."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.images import PAGE, signed, write_layer
from tests.support.stores import age, pages, write_chain


def write_at(path: Path, *numbers: int, layer: int = 2) -> None:
    """Write whole pages, signed as this layer's, with write(2)."""
    with path.open("r+b", buffering=0) as file:
        for offset, data in pages(layer, numbers):
            os.pwrite(file.fileno(), data, offset)
        os.fsync(file.fileno())


def dense_store(store: Path, count: int) -> list[str]:
    """A chain of so many dense links over a base; their tags, oldest first."""
    tags = ["base", *(f"t{n:03}" for n in range(count))]
    write_chain(store, tags)
    for n, tag in enumerate(tags):
        memory = store / tag / "memory.bin"
        write_layer(memory, 16 * PAGE, [(0, signed(0, 0, 16 * PAGE)), *pages(n, [n % 16])])
        age(memory)
    return tags[1:]
