"""How much memory a mount takes with 16 chains of 100,000 segments open.

A script, not a test: ``python -m tests.bench.memory [chains [segments [directory]]]``. The goal is
less than 80 MiB. A store has one base, full of data, and a diff for each chain that holds every
other page; each image is opened and read from once, and stays open. The store takes 3.6 GiB beneath
the directory. Beside the daemon's resident memory (VmRSS of proc(5): libraries that it shares with
others included) stands what it takes before the first image is opened, and after its metrics were
read for the first time. It exits with 1 where the goal is missed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.support.mounts import mounted

PAGE = 4096
GOAL = 80 << 20


def write_store(store: Path, chains: int, segments: int) -> list[str]:
    """A base and so many diffs over it, whose views have so many segments each; their tags."""
    size = segments * PAGE
    write_tag(store, "base", {}, range(0, segments, 256), b"b" * (256 * PAGE), size)
    tags = [f"leaf-{n}" for n in range(chains)]
    for tag in tags:
        write_tag(store, tag, {"parent_tag": "base"}, range(1, segments, 2), b"d" * PAGE, size)
    return tags


def write_tag(
    store: Path, tag: str, document: dict[str, str], numbers: range, data: bytes, size: int
) -> None:
    folder = store / tag
    folder.mkdir(parents=True)
    with (folder / "memory.bin").open("wb", buffering=0) as file:
        for number in numbers:
            os.pwrite(file.fileno(), data, number * PAGE)
        file.truncate(size)
    (folder / "snapshot.json").write_text(json.dumps({"memory": "memory.bin"} | document))


def resident(pid: int) -> int:
    """The bytes of the process that are in memory."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(text.split("VmRSS:")[1].split()[0]) << 10


def main(chains: int = 16, segments: int = 100_000, directory: str | None = None) -> int:
    with tempfile.TemporaryDirectory(dir=directory) as place, ExitStack() as opened:
        store, mountpoint = Path(place) / "store", Path(place) / "mountpoint"
        mountpoint.mkdir()
        tags = write_store(store, chains, segments)
        mount = opened.enter_context(mounted(store, mountpoint))
        idle = resident(mount.pid)
        began = time.perf_counter()
        for tag in tags:
            view = opened.enter_context((mountpoint / tag / "memory.bin").open("rb", buffering=0))
            view.read(PAGE)
        seconds = time.perf_counter() - began
        taken = resident(mount.pid)
        (mountpoint / ".diffmergefs" / "metrics").read_bytes()
        scraped = resident(mount.pid)
    print(f"before anything was opened:    {idle / (1 << 20):6.1f} MiB")
    print(f"{chains} chains of {segments} segments open: {taken / (1 << 20):6.1f} MiB (goal: 80)")
    print(f"after the metrics were read:   {scraped / (1 << 20):6.1f} MiB")
    print(f"opening them took {seconds:.1f} s")
    return int(max(taken, scraped) >= GOAL)


if __name__ == "__main__":
    _, *given = sys.argv
    sys.exit(main(int(given[0]), int(given[1]), *given[2:]))
