"""Another process that has files open for writing, and whether a lease is in its way."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The kernel breaks a lease that nobody gives back after 45 seconds.
_PATIENCE_SECONDS = 40

_OPENER = """
import os, sys
files = [os.open(path, os.O_RDWR) for path in sys.argv[1:]]
print("opened", flush=True)
sys.stdin.read()
"""


@contextmanager
def opened_for_writing(*paths: Path) -> Iterator[None]:
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
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], _PATIENCE_SECONDS)
        assert readable, f"nobody gave a lease back within {_PATIENCE_SECONDS} s"
        assert process.stdout.readline(), "the opener ended"
        yield
    finally:
        process.kill()
        process.communicate(timeout=60)


def is_leased(path: Path) -> bool:
    """Whether a lease stands in the way of a writer now; if so it is being broken from now on."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    except BlockingIOError:
        return True
    return False
