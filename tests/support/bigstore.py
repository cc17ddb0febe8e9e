"""A chain of three tags that is large enough to be a load, and what each must show."""

from __future__ import annotations

from pathlib import Path

from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.stores import age, write_tag

MIB = 1 << 20
SIZE = 64 * MIB

CHAIN = {
    "base": [(0, signed(0, 0, 48 * MIB))],
    "mid": [(n * 16 * PAGE, signed(1, n * 16 * PAGE, 3 * PAGE)) for n in range(1024)],
    "leaf": [(n * 10 * PAGE, signed(2, n * 10 * PAGE, 2 * PAGE)) for n in range(1600)],
}


def write_store(folder: Path) -> tuple[Path, list[tuple[str, Path]]]:
    """A store of the chain, and for each tag the file that its view must be equal to."""
    store, oracles = folder / "store", []
    tags = list(CHAIN)
    for n, tag in enumerate(tags):
        write_tag(store, tag, tags[n - 1] if n else None, layer=n, numbers=[], size=SIZE)
        age(write_layer(store / tag / "memory.bin", SIZE, CHAIN[tag]))
        oracle = folder / f"{tag}.oracle"
        oracle.write_bytes(overlay_oracle(SIZE, [CHAIN[t] for t in tags[: n + 1]]))
        oracles.append((f"{tag}/memory.bin", oracle))
    return store, oracles
