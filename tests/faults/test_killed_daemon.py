"""The daemon dies by SIGKILL under load: readers get an error, nothing hangs, and it remounts."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.support import mounttable
from tests.support.bigstore import write_store
from tests.support.live import held
from tests.support.mounts import mounted
from tests.support.readers import reading

READERS = 16
# A new open or lookup, a read, and a page fault, each of a mount without its server.
ERRORS = {os.strerror(107), os.strerror(103), os.strerror(5), "SIGBUS"}


def test_kill_9_under_load(
    public_path: Path, mountpoint: Path, count: Callable[[int], int], seen: Callable[..., None]
) -> None:
    """Readers by pread and mmap, the daemon killed at a random moment, and a new mount over it"""
    store, oracles = write_store(public_path)
    pairs = [(mountpoint / name, oracle) for name, oracle in oracles]
    ends: Counter[str] = Counter()
    kills, reads = count(20), 0
    for _ in range(kills):
        with mounted(store, mountpoint) as mount:
            assert len(mounttable.at(str(mountpoint))) == 1
            with reading(READERS, pairs) as load:
                time.sleep(random.random() / 2)
                mount.kill()
                more, _, ended = load.outcome()
            assert set(ended) <= ERRORS and ended.total() == READERS
            reads, ends = reads + more, ends + ended
            mount_again(store, mountpoint)
            for view, oracle in pairs:
                assert view.read_bytes() == oracle.read_bytes()
            unmount(mountpoint)
    assert not mounttable.at(str(mountpoint))
    seen(kills=kills, reads_right_before_them=reads, readers_ended_by=ends)


def mount_again(store: Path, mountpoint: Path) -> None:
    done = run("mount", store, mountpoint)
    assert done.returncode == 0
    assert "a stale mount of a daemon that died; unmounted" in done.stderr
    assert len(mounttable.at(str(mountpoint))) == 1


def unmount(mountpoint: Path) -> None:
    done = run("umount", mountpoint)
    assert (done.returncode, done.stderr) == (0, "")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffmergefs", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_mappings_of_a_killed_daemon(public_path: Path, mountpoint: Path) -> None:
    """What a mapping has touched stays right under a new mount; the rest is SIGBUS at once"""
    store, oracles = write_store(public_path)
    name, path = oracles[-1]
    oracle = path.read_bytes()
    with mounted(store, mountpoint) as mount, held(mountpoint / name) as holder:
        assert holder.read(0, 8192) == oracle[:8192]
        mount.kill()
        mount_again(store, mountpoint)
        assert holder.read(0, 8192) == oracle[:8192]
        assert holder.read(32 << 20, 4096) == b""
        assert holder.process.wait(60) == -signal.SIGBUS
        assert (mountpoint / name).read_bytes() == oracle
        unmount(mountpoint)
