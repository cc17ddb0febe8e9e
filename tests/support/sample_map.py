"""The picture on the page of `map`: `python -m tests.support.sample_map docs/map.png` makes it."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from diffmergefs import cli
from tests.support.images import PAGE
from tests.support.stores import age, write_tag

PAGES = 12 << 10
#: What is drawn, beneath the current directory.
IMAGE = "snapshots/agent"


def write_store(store: Path) -> None:
    """A chain of a base and four diffs with clusters, scattered pages and written zeros."""
    chance = random.Random(7)
    base = [*range(3000), *range(3400, 6200), *range(7000, 10100)]
    write_tag(store, "kernel", numbers=base, size=PAGES * PAGE)
    parent = "kernel"
    for layer, tag in enumerate(("python", "numpy", "warmup", "agent"), 1):
        middle = PAGES * layer // 5
        clusters = [(chance.randrange(PAGES - 200), chance.randrange(40, 200)) for _ in range(4)]
        numbers = {page for start, count in clusters for page in range(start, start + count)}
        numbers |= {int(chance.gauss(middle, PAGES / 12)) % PAGES for _ in range(260)}
        numbers |= {chance.randrange(PAGES) for _ in range(160)}
        folder = write_tag(
            store, tag, parent, layer=layer, numbers=sorted(numbers), size=PAGES * PAGE
        )
        zeros = chance.randrange(PAGES - 300)
        _clear(folder / "memory.bin", range(zeros, zeros + 160))
        parent = tag


def _clear(path: Path, pages: Iterable[int]) -> None:
    with path.open("r+b", buffering=0) as file:
        for page in pages:
            os.pwrite(file.fileno(), bytes(PAGE), page * PAGE)
        os.fsync(file.fileno())
    age(path)


def draw(output: Path) -> int:
    """Make the chain in a directory of its own and draw it; the exit code of `map`."""
    output = output.absolute()
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        write_store(Path("snapshots"))
        return cli.main(["map", "--zeros", "--force", "-o", str(output), IMAGE])


if __name__ == "__main__":
    sys.exit(draw(Path(sys.argv[1])))
