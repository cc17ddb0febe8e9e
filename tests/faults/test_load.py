"""Many readers at once: every byte right, and a daemon whose memory stays as it is."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.support.bigstore import MIB, write_store
from tests.support.mounts import mounted
from tests.support.readers import reading

READERS = 64
#: What a process may gain in one half of the run over the other and still be flat.
SLACK_KIB = 8 * 1024


def resident(pid: int) -> int:
    """The KiB of memory that the process itself holds."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"^RssAnon:\s+(\d+) kB$", text, re.MULTILINE)
    assert found
    return int(found[1])


def test_readers(
    public_path: Path,
    mountpoint: Path,
    soak: bool,
    seen: Callable[..., None],
) -> None:
    """64 readers by pread and mmap, each byte compared, the daemon's memory sampled"""
    store, oracles = write_store(public_path)
    seconds = 60 if soak else 4
    with mounted(store, mountpoint) as mount:
        before = resident(mount.pid)
        with reading(READERS, [(mountpoint / name, oracle) for name, oracle in oracles]) as load:
            samples = []
            for _ in range(seconds * 5):
                time.sleep(0.2)
                samples.append(resident(mount.pid))
            reads, length, ends = load.end()
        assert ends == Counter(well=READERS)
        assert reads >= READERS
        # The first samples are those of a daemon that still grows to its load.
        middle = len(samples) // 4
        early, late = samples[middle : 2 * middle], samples[2 * middle :]
        assert max(late) <= max(early) + SLACK_KIB, samples
    seen(
        seconds=seconds,
        reads=reads,
        MiB_compared=length // MIB,
        daemon_KiB_before=before,
        at_most_in_the_2nd_quarter=max(early),
        at_most_after_it=max(late),
    )
