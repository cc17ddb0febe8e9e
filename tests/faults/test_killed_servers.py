"""Servers die by SIGKILL under load: each is replaced, and no client sees more than a pause"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.bigstore import MIB, write_store
from tests.support.changing import changing
from tests.support.live import until
from tests.support.mounts import Mount, mounted
from tests.support.readers import reading
from tests.support.servers import (
    TOOK_OVER,
    covered,
    descriptors,
    kill_and_wait,
    kill_at,
    memory_files_kib,
    memory_kib,
    takeovers,
)

__all__ = ["covered"]

pytestmark = pytest.mark.usefixtures("covered")

READERS, WALKERS = 16, 4
#: What keeper and server together may gain over a run and still be flat.
SLACK_KIB = 8 * 1024


class Footprint:
    """What a keeper and its server hold when nothing is asked of them."""

    def __init__(self, mount: Mount) -> None:
        keeper, server = mount.process.pid, mount.pid
        self.files = descriptors(keeper), descriptors(server)
        self.kib = memory_kib(keeper) + memory_kib(server) + memory_files_kib(keeper)


def moments(dice: random.Random, kills: int) -> Iterator[float]:
    """How long each server lives. Now and then one has time to look for new tags."""
    return (2.0 if number % 20 == 10 else dice.random() / 5 for number in range(kills))


@pytest.mark.timeout(600)
def test_kills_at_random_moments(
    public_path: Path, mountpoint: Path, count: Callable[[int], int], seen: Callable[..., None]
) -> None:
    """16 readers by pread and mmap, 4 that list, stat and open, and tags that come and go"""
    store, oracles = write_store(public_path)
    kills = count(1000)
    with mounted(store, mountpoint, expect_log=(TOOK_OVER,)) as mount:
        pairs = [(mountpoint / name, oracle) for name, oracle in oracles]
        for view, oracle in pairs:
            assert view.read_bytes() == oracle.read_bytes()
        kill_and_wait(mount)
        before = Footprint(mount)
        with (
            changing(store, mountpoint, "leaf", oracles[-1][1]) as changer,
            reading(READERS, pairs, WALKERS) as load,
        ):
            assert kill_at(mount, moments(random.Random(), kills)) == kills
            reads, length, ends = load.end()
        assert ends == Counter(well=READERS + WALKERS)
        for view, oracle in pairs:
            assert view.read_bytes() == oracle.read_bytes()
        kill_and_wait(mount)
        until(lambda: Footprint(mount).files <= before.files, f"not {before.files} descriptors")
        after = Footprint(mount)
        # One that was killed while it began says nothing.
        assert takeovers(mount) > kills // 2
    assert reads > kills and changer.cycles >= kills // 100
    seen(
        kills=kills,
        steps=reads,
        MiB_compared=length // MIB,
        tags_added_replaced_and_removed=changer.cycles,
        longest_stall_ms=load.longest_ms,
        descriptors_of_keeper_and_server=f"{before.files}, then {after.files}",
        KiB_of_both=f"{before.kib}, then {after.kib}",
    )
    assert after.kib <= before.kib + SLACK_KIB


def test_what_was_replaced_and_unlinked_is_served_on(
    public_path: Path, mountpoint: Path, count: Callable[[int], int]
) -> None:
    """Every layer of an open image is deleted, and so are the store, and another is in its place"""
    store, oracles = write_store(public_path)
    name, oracle = oracles[-1]
    expected = oracle.read_bytes()
    expected_log = TOOK_OVER, "another directory is at", "not shown"
    with (
        mounted(store, mountpoint, expect_log=expected_log) as mount,
        (mountpoint / name).open("rb", buffering=0) as file,
    ):
        store.rename(store.with_name("gone"))
        for path in store.with_name("gone").rglob("memory.bin"):
            path.unlink()
        (public_path / "other").mkdir()
        other, others = write_store(public_path / "other")
        other.rename(store)
        until(lambda: "another directory is at" in mount.log(), "it is not followed")
        for _ in range(count(100)):
            kill_and_wait(mount)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), MIB, 48 * MIB) == expected[48 * MIB : 49 * MIB]
        file.seek(0)
        assert file.readall() == expected
        for name, oracle in others:
            assert (mountpoint / name).read_bytes() == oracle.read_bytes()
