"""How fast a parent's pin is checked: the first time, and when it is remembered.

A script, not a test: ``python -m tests.bench.pins [MiB [directory]]``. The goals: over 1 GB/s a
core where the CPU has SHA instructions, and under 5 ms for the second check of a link of 512 MiB.
The second check is that of a new process, but for the start of Python: nothing of the first is
kept in memory. To open the layer (fsync, and asking where its holes are) is needed with and
without a pin, and shown by itself. Speeds a core are of the processor's time. It exits with 1
where a goal is missed.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

from diffmergefs.core.layer import Layer
from diffmergefs.core.sparse import BLOCK
from diffmergefs.opening.pins import Hashes, content_hash, require_pin
from diffmergefs.sidecars.verified import Remembered
from diffmergefs.stores.snapshot import Snapshot

GB = 1e9
MIB = 1 << 20
ROUNDS = 5


def has_sha_instructions() -> bool:
    """Whether the CPU says so (x86: sha_ni, ARM: sha2)."""
    text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    return not {"sha_ni", "sha2"}.isdisjoint(text.split())


def seconds_of_memory(size: int) -> float:
    """The processor's time for hashing as many bytes as the file has, without a file."""
    block = bytes(BLOCK)
    began = time.thread_time()
    digest = hashlib.sha256()
    for _ in range(size // BLOCK):
        digest.update(block)
    return time.thread_time() - began


def seconds_of_check(path: Path, link: Snapshot, state: str) -> tuple[float, float]:
    """Opening the layer as a new process does, and comparing its hash."""
    began = time.perf_counter()
    layer = Layer.open(str(path))
    opened = time.perf_counter()
    require_pin(layer, link, Hashes(Remembered(state)))
    ended = time.perf_counter()
    layer.close()
    return opened - began, ended - opened


def main(mebibytes: int = 512, directory: str | None = None) -> int:
    size = mebibytes * MIB
    with tempfile.TemporaryDirectory(dir=directory) as place:
        path = Path(place) / "parent.mem"
        pattern = bytes(range(256)) * (MIB // 256)
        with path.open("wb") as file:
            for number in range(mebibytes):
                file.write(number.to_bytes(8, "little") + pattern[8:])
        layer = Layer.open(str(path))
        memory = min(seconds_of_memory(size) for _ in range(ROUNDS))
        read = []
        for _ in range(ROUNDS):
            began = time.thread_time()
            recorded = content_hash(layer)
            read.append(time.thread_time() - began)
        layer.close()
        time.sleep(0.1)  # a file that has just been written is not remembered
        link = Snapshot("child", "parent", parent_hash=recorded)
        state = f"{place}/state"
        _, first = seconds_of_check(path, link, state)
        checks = [seconds_of_check(path, link, state) for _ in range(ROUNDS)]
    speed = size / min(read) / GB
    second = statistics.median(check for _, check in checks)
    opening = statistics.median(opening for opening, _ in checks)
    print(f"SHA instructions: {'yes' if has_sha_instructions() else 'no'}")
    print(f"sha256 of memory: {size / memory / GB:.2f} GB/s a core")
    print(f"sha256 of a cached file: {speed:.2f} GB/s a core, {memory / min(read):.2f} of that")
    print(f"first check of {mebibytes} MiB: {first * 1e3:.1f} ms")
    print(f"second check: {second * 1e3:.2f} ms (goal: 5), {first / second:.0f} times faster")
    print(f"opening the layer: {opening * 1e3:.2f} ms")
    return int(second >= 0.005 or (has_sha_instructions() and speed <= 1))


if __name__ == "__main__":
    _, *given = sys.argv
    sys.exit(main(int(given[0]) if given else 512, given[1] if given[1:] else None))
