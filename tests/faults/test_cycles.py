"""Mounted and unmounted, opened and closed, again and again: nothing is left over."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffmergefs import DiffMergeError, open_chain, open_image
from diffmergefs.core.errors import BrokenChainError, SizeMismatchError
from tests.support import mounttable
from tests.support.images import PAGE, signed
from tests.support.live import until
from tests.support.mounts import CONNECTIONS, mounted, require_fusectl
from tests.support.stores import write_chain, write_tag


def descriptors(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def own_descriptors() -> int:
    gc.collect()  # What earlier tests left in cycles may go at any moment.
    return descriptors()


def processes_with(path: Path) -> list[str]:
    """The processes that have this path among their arguments."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            arguments = Path(f"/proc/{name}/cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(path) in arguments:
            found.append(name)
    return found


def test_mounts_and_unmounts(public_path: Path, soak: bool, seen: Callable[..., None]) -> None:
    """Background mounts by the command: no mount, connection, process or descriptor stays"""
    cycles, lanes = (1000 if soak else 20), 2
    store = write_chain(public_path / "store", ["base", "leaf"])
    require_fusectl()
    before = own_descriptors()
    own: set[tuple[int, int]] = set()
    with ThreadPoolExecutor(lanes) as pool:
        done = [pool.submit(cycle, store, public_path, n, cycles, lanes, own) for n in range(lanes)]
        for lane in done:
            lane.result()
    until(lambda: not processes_with(public_path), "a daemon did not end")
    below = f"{public_path}/"
    assert not [entry for entry in mounttable.entries() if entry.path.startswith(below)]
    assert descriptors() == before
    until(lambda: not own & connections(), "a connection is left")
    seen(cycles=cycles, device_numbers_used=len({minor for minor, _ in own}))


def connections() -> set[tuple[int, int]]:
    """The FUSE connections of the machine: device number, and inode number of what stands for it.

    Device numbers are used again, at once by whoever mounts next, other programs among them; that
    is another connection.
    """
    with os.scandir(CONNECTIONS) as entries:
        return {(int(entry.name), entry.inode()) for entry in entries}


def cycle(
    store: Path, folder: Path, lane: int, cycles: int, lanes: int, own: set[tuple[int, int]]
) -> None:
    mountpoint = folder / f"mnt{lane}"
    mountpoint.mkdir()
    view = mountpoint / "leaf" / "memory.bin"
    for n in range(lane, cycles, lanes):
        command("mount", "--log", folder / "log", store, mountpoint)
        (entry,) = mounttable.at(str(mountpoint))
        own.add((entry.minor, (CONNECTIONS / str(entry.minor)).stat().st_ino))
        assert view.read_bytes()[PAGE : 2 * PAGE] == signed(1, PAGE, PAGE)
        command("umount", *(["--lazy"] if n % 10 == 9 else []), mountpoint)
        assert not mounttable.at(str(mountpoint)), f"cycle {n}"


def command(*arguments: object) -> None:
    words = [sys.executable, "-m", "diffmergefs", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done


def test_opens_and_closes_through_one_mount(
    public_path: Path, mountpoint: Path, count: Callable[[int], int], seen: Callable[..., None]
) -> None:
    """The daemon holds no more descriptors after many opens, lookups and listings than before"""
    store = write_chain(public_path / "store", ["base", "leaf"])
    write_tag(store, "broken", "missing", layer=3)
    rounds = count(2000)
    with mounted(store, mountpoint, expect_log=("broken",)) as mount:
        use(mountpoint)
        before = until_steady(mount.pid)
        for _ in range(rounds):
            use(mountpoint)
        assert until_steady(mount.pid) == before
    seen(rounds=rounds, descriptors=before)


def use(mountpoint: Path) -> None:
    os.listdir(mountpoint)
    for name in ("memory.bin", "vmstate", "snapshot.json"):
        with (mountpoint / "leaf" / name).open("rb") as file:
            assert file.read(1)
    os.listdir(mountpoint / "leaf")
    with pytest.raises(OSError):
        (mountpoint / "broken" / "memory.bin").open("rb")


def until_steady(pid: int) -> int:
    """How many descriptors it has open, once that was the same ten times."""
    counts = [descriptors(pid)]

    def steady() -> bool:
        counts.append(descriptors(pid))
        return len(counts) > 10 and len(set(counts[-10:])) == 1

    until(steady, "the daemon opens and closes on and on")
    return counts[-1]


def test_views_opened_and_closed_in_this_process(
    tmp_path: Path, count: Callable[[int], int], seen: Callable[..., None]
) -> None:
    """By the library, those that are refused half-way among them"""
    store = write_chain(tmp_path / "store", ["base", "middle", "leaf"])
    write_tag(store, "orphan", "missing", layer=3)
    write_tag(store, "longer", "leaf", layer=4, size=32 * PAGE)
    layers = [store / tag / "memory.bin" for tag in ("base", "middle", "leaf")]
    refused: list[tuple[Callable[[], object], type[DiffMergeError]]] = [
        (lambda: open_image(store / "orphan"), BrokenChainError),
        (lambda: open_image(store / "longer"), SizeMismatchError),
        (lambda: open_chain(layers[0], [store / "longer" / "memory.bin"]), SizeMismatchError),
    ]
    rounds, before = count(1000), own_descriptors()
    for _ in range(rounds):
        with open_image(store / "leaf").view as view, open_chain(layers[0], layers[1:]).view as own:
            assert view.read(0, view.size) == own.read(0, own.size)
        for attempt, error in refused:
            with pytest.raises(error):
                attempt()
    assert descriptors() == before
    seen(rounds=rounds, refused=rounds * len(refused))
