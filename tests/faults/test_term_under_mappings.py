"""SIGTERM while private mappings are alive: none dies, and the daemon ends with the last."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.support import mounttable
from tests.support.bigstore import SIZE, write_store
from tests.support.live import held, until
from tests.support.mounts import mounted

MAPPINGS = 16
STEP = 1 << 20


def test_mappings_outlive_the_mount(
    public_path: Path,
    mountpoint: Path,
    soak: bool,
    count: Callable[[int], int],
    seen: Callable[..., None],
) -> None:
    """16 private mappings of all tags, each read whole after the SIGTERM, then closed in turn"""
    store, oracles = write_store(public_path)
    rounds, compared = count(10), 0
    share = 1 if soak else 8  # of each mapping; together they are the whole
    for _ in range(rounds):
        with mounted(store, mountpoint) as mount, ExitStack() as stack:
            users = []
            for n in range(MAPPINGS):
                name, oracle = oracles[n % len(oracles)]
                users.append((stack.enter_context(held(mountpoint / name)), oracle))
            for holder, oracle in users[::2]:
                assert holder.read(0, 4096) == oracle.read_bytes()[:4096]
            mount.process.send_signal(signal.SIGTERM)
            until(lambda: not mounttable.at(str(mountpoint)), "it was not detached")
            assert f"{MAPPINGS} files are open; serving" in mount.log()
            assert os.listdir(mountpoint) == []
            for n, (holder, oracle) in enumerate(users):
                expected = oracle.read_bytes()
                for start in range(n % share * STEP, SIZE, share * STEP):
                    compared += STEP
                    assert holder.read(start, STEP) == expected[start : start + STEP]
            for holder, _ in users[:-1]:
                assert holder.process.poll() is None
                holder.end()
            last, oracle = users[-1]
            assert last.read(SIZE - 4096, 4096) == oracle.read_bytes()[-4096:]
            assert mount.process.poll() is None
            last.end()
            assert mount.process.wait(60) == 0
    seen(rounds=rounds, mappings=rounds * MAPPINGS, MiB_compared=compared // STEP)
