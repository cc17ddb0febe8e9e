"""Somebody who has files open for writing, and what the kernel says of leases."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

#: The kernel's limit is 45 seconds: who waits for that long waits for a lease nobody gave back.
PATIENCE_SECONDS = 40

# Says how many seconds it waited for each.
_OPENER = """
import os, sys, time
waits, files = [], []
for path in sys.argv[1:]:
    begun = time.monotonic()
    files.append(os.open(path, os.O_RDWR))
    waits.append(time.monotonic() - begun)
print(*waits, flush=True)
sys.stdin.read()
"""


class Opener(NamedTuple):
    """A process that has files open for writing, and the seconds that it waited for each."""

    process: subprocess.Popen[str]
    waits: list[float]


@contextmanager
def opened_for_writing(*paths: Path) -> Iterator[Opener]:
    """Another process that has the files open for reading and writing, and writes nothing.

    Fails if opening them takes as long as a lease that nobody gives back.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _OPENER, *map(str, paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    try:
        yield Opener(process, _waits(process))
    finally:
        process.kill()
        process.communicate(timeout=60)


def _waits(process: subprocess.Popen[str]) -> list[float]:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], PATIENCE_SECONDS)
    assert readable, f"nobody gave a lease back within {PATIENCE_SECONDS} s"
    line = process.stdout.readline()
    assert line, "the opener ended"
    return [float(word) for word in line.split()]


def is_leased(path: Path) -> bool:
    """Whether a lease stands in the way of a writer now; if so it is being broken from now on."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    except BlockingIOError:
        return True
    return False


def break_leases(paths: Sequence[Path]) -> None:
    """Have the leases on all of these files broken, without waiting for it; they have some."""
    held = [path for path in paths if is_leased(path)]
    assert held == list(paths)


def lease_holders(path: Path) -> set[int]:
    """The processes that have a lease on the file."""
    status = path.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    lines = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
    return {int(fields[4]) for fields in lines if fields[1] == "LEASE" and device in fields}
