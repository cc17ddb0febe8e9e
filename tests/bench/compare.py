"""How fast two equal files are compared, against GNU cmp.

A script, not a test: ``python -m tests.bench.compare [MiB [directory]]``. The goal: rediff over two
equal cached files takes at most 1.2 times as long as cmp. Both are run in turns, and the best of
each counts: whatever else the machine does makes times longer, never shorter. Opening the files
(fsync, and asking where their holes are) and writing the diff, which is empty, are in it; the start
of Python, 0.2 s whatever the files' size, is shown by itself. It exits with 1 where the goal is
missed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from diffmergefs.opening.images import open_side
from diffmergefs.writing.diffs import rediff

MIB = 1 << 20
ROUNDS = 5
GOAL_RATIO = 1.2


class Figures(NamedTuple):
    """Seconds for two files of `size` bytes: ours, by two processes, cmp's, and Python's start."""

    size: int
    rediff: float
    rediff_jobs_2: float
    cmp: float
    start: float

    @property
    def ratio(self) -> float:
        """rediff's time as a multiple of cmp's."""
        return self.rediff / self.cmp


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def write_equal(place: Path, mebibytes: int) -> tuple[Path, Path]:
    """Two equal files without a hole, in the page cache; no two of their pages are equal."""
    pattern = bytes(range(256)) * 15 + bytes(248)
    paths = place / "parent", place / "child"
    for path in paths:
        with path.open("wb") as file:
            for number in range(mebibytes):
                first = number * 256
                file.write(
                    b"".join(n.to_bytes(8, "little") + pattern for n in range(first, first + 256))
                )
    return paths


def run_rediff(parent: Path, child: Path, output: Path, jobs: int) -> None:
    """As the command does it, in this process."""
    with open_side(parent).view as before, open_side(child).view as after:
        result = rediff(before, after, output, force=True, jobs=jobs)
    assert result.compared_bytes == parent.stat().st_size and result.changed_pages == 0


def measure(mebibytes: int = 1024, directory: str | None = None) -> Figures:
    """The best of `ROUNDS` for each."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        place = Path(name)
        parent, child = write_equal(place, mebibytes)
        size = parent.stat().st_size
        command = ["cmp", str(parent), str(child)]
        rounds = [
            (
                seconds(lambda: run_rediff(parent, child, place / "diff", 1)),
                seconds(lambda: run_rediff(parent, child, place / "diff", 2)),
                seconds(lambda: subprocess.run(command, check=True)),
                seconds(lambda: subprocess.run([sys.executable, "-c", "import diffmergefs.cli"])),
            )
            for _ in range(ROUNDS)
        ]
    return Figures(size, *map(min, zip(*rounds, strict=True)))


def main(mebibytes: int = 1024, directory: str | None = None) -> int:
    found = measure(mebibytes, directory)
    gib = found.size / (1 << 30)
    print(f"two equal cached files of {mebibytes} MiB:")
    print(f"  cmp           {found.cmp:6.3f} s, {gib / found.cmp:.2f} GiB/s")
    print(f"  rediff        {found.rediff:6.3f} s, {gib / found.rediff:.2f} GiB/s")
    print(f"  rediff --jobs 2 {found.rediff_jobs_2:4.3f} s, {gib / found.rediff_jobs_2:.2f} GiB/s")
    print(f"  start of Python {found.start:4.3f} s")
    print(f"  rediff takes {found.ratio:.2f} x cmp (goal: {GOAL_RATIO})")
    return int(found.ratio > GOAL_RATIO)


if __name__ == "__main__":
    _, *given = sys.argv
    sys.exit(main(int(given[0]) if given else 1024, given[1] if given[1:] else None))
