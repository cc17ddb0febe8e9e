"""How fast the seal of a much fragmented diff is made, written and read.

A script, not a test: ``python -m tests.bench.seal [ranges [directory]]``. The goal: a seal of 1 M
ranges loads in under 5 s, the comparison with the file aside. That is shown too: for ranges of one
page, and for as many bytes in one range. All is the processor's time. It exits with 1 where the
goal is missed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from diffmergefs.core.layer import Layer
from diffmergefs.sidecars import bmap, seal
from diffmergefs.writing import sealing

PAGE = 4096
GB = 1e9
GOAL_SECONDS = 5


def write_diff(path: Path, ranges: int) -> None:
    """Every second page of a file is data."""
    with path.open("wb") as file:
        file.truncate(2 * ranges * PAGE)
        for number in range(ranges):
            os.pwrite(file.fileno(), number.to_bytes(8, "little") * (PAGE // 8), 2 * number * PAGE)


def seconds(clock: float) -> float:
    return time.thread_time() - clock


def main(ranges: int = 1_000_000, directory: str | None = None) -> int:
    with tempfile.TemporaryDirectory(dir=directory) as place:
        path = Path(place) / "diff"
        write_diff(path, ranges)
        clock = time.thread_time()
        result = sealing.seal_layer(path)
        made = seconds(clock)
        data = Path(result.path).read_bytes()
        clock = time.thread_time()
        stored = seal.read(result.path)
        loaded = seconds(clock)
        clock = time.thread_time()
        extents = stored.content.extents()
        indexed = seconds(clock)
        clock = time.thread_time()
        bmap.dump(stored.content)
        dumped = seconds(clock)
        layer = Layer.open(str(path))
        clock = time.thread_time()
        seal.compare(layer, stored)
        compared = seconds(clock)
        whole = Path(place) / "whole"
        with whole.open("wb") as file:
            for number in range(ranges):
                file.write(number.to_bytes(8, "little") * (PAGE // 8))
            file.truncate((ranges + 1) * PAGE)
        sealing.seal_layer(whole)
        one = seal.find(str(whole))
        assert one is not None and len(extents) == ranges
        layer = Layer.open(str(whole))
        clock = time.thread_time()
        seal.compare(layer, one)
        compared_one = seconds(clock)
    size = ranges * PAGE
    print(f"{ranges} ranges of {PAGE} bytes, a seal of {len(data) / 1e6:.0f} MB")
    print(f"  sealed   {made:6.2f} s, of which {dumped:.2f} s to write it out")
    print(f"  loaded   {loaded + indexed:6.2f} s, goal {GOAL_SECONDS} s")
    print(f"  compared {compared:6.2f} s, {size / compared / GB:.2f} GB/s")
    print(f"  compared {compared_one:6.2f} s as one range, {size / compared_one / GB:.2f} GB/s")
    return 0 if loaded + indexed < GOAL_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main(*(int(sys.argv[1]),) if sys.argv[1:] else (), *sys.argv[2:3]))
