"""How long four layers of a million extents each take to merge, and what the map weighs.

A script, not a test: ``python -m tests.bench.index [extents [layers]]``. The goal is less than
5 seconds, and at most 24 bytes a segment at rest.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator

from diffmergefs.core.extents import ExtentList, SegmentMap

PAGE = 4096


def scattered(count: int, seed: int) -> Iterator[tuple[int, int]]:
    """So many extents of one to four pages, with holes of one to four pages between them."""
    numbers = random.Random(seed)
    position = 0
    for _ in range(count):
        start = position + PAGE * numbers.randint(1, 4)
        position = start + PAGE * numbers.randint(1, 4)
        yield start, position


def main(extents: int = 1_000_000, layers: int = 4) -> None:
    lists = [ExtentList(scattered(extents, seed)) for seed in range(layers)]
    began = time.perf_counter()
    segments = SegmentMap(lists)
    seconds = time.perf_counter() - began
    each = segments.nbytes / len(segments)
    print(f"{layers} layers of {extents} extents: {len(segments)} segments")
    print(f"merged in {seconds:.2f} s (goal: 5), {each:.1f} bytes a segment (goal: 24)")
    numbers = random.Random(0)
    offsets = [numbers.randrange(extents * 5) * PAGE for _ in range(100_000)]
    began = time.perf_counter()
    for offset in offsets:
        next(iter(segments.window(offset, offset + PAGE)))
    microseconds = (time.perf_counter() - began) * 1e6 / len(offsets)
    print(f"a look-up of one page takes {microseconds:.2f} us")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
