"""All cases by name, and the images, stores and guests that they need."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path

from tests.bench import (
    fault_cases,
    firecracker_cases,
    mount_cases,
    page_servers,
    read_cases,
    restore_cases,
    write_cases,
)
from tests.bench.guests import Stopped, stop_guest
from tests.bench.images import Images, Store, write_store
from tests.bench.measure import MIB, PAGE, Record, Scale
from tests.bench.microvms import MicroVm, take_apart

_IN_MEMORY = Path("/dev/shm")


class Bench:
    """What cases measure, made when the first of them asks for it.

    Images and stores lie on an ext4 in a file in memory, where there is enough of it: its cost is
    the same in each round, and a hundred thousand extents are gone in no time. Guests lie in
    `directory`.
    """

    def __init__(self, scale: Scale, directory: Path) -> None:
        self.scale = scale
        self.directory = directory
        self.memory = Path(tempfile.mkdtemp(prefix="bench-", dir=_memory(scale, directory)))
        self._stack = ExitStack()
        self._guests: dict[int, Stopped] = {}

    @cached_property
    def images(self) -> Images:
        diffs = (len(self.scale.depths) + 8) * self.scale.dirty_pages * PAGE
        return Images(self._ext4(2 * self.scale.image + 2 * diffs), self.scale)

    @cached_property
    def store(self) -> Store:
        diffs = self.scale.snapshots * self.scale.dirty_pages * PAGE
        root = self._ext4(self.scale.snapshot_size // 16 + diffs * 5 // 4)
        return write_store(root / "store", self.scale)

    @cached_property
    def microvm(self) -> MicroVm:
        return take_apart(self.directory / "microvm")

    @cached_property
    def huge_microvm(self) -> MicroVm:
        return page_servers.take_huge(self.directory / "microvm-huge")

    def guest(self, mebibytes: int) -> Stopped:
        if mebibytes not in self._guests:
            folder = self.directory / f"guest-{mebibytes}"
            self._guests[mebibytes] = stop_guest(folder, mebibytes)
        return self._guests[mebibytes]

    def clear(self) -> None:
        """Remove all that was made; it is made anew when it is asked for again."""
        for name in ("images", "store", "microvm", "huge_microvm"):
            self.__dict__.pop(name, None)
        self._guests.clear()
        self._stack.close()
        for path in self.directory.iterdir():
            if path != self.memory:
                shutil.rmtree(path)

    def close(self) -> None:
        """Remove all, with the directory in memory."""
        self.clear()
        self.memory.rmdir()

    def _ext4(self, size: int) -> Path:
        return self._stack.enter_context(
            write_cases.filesystem("ext4", self.memory, size + 512 * MIB)
        )


def _memory(scale: Scale, directory: Path) -> Path:
    # What lies there is there twice: in the file of its filesystem and in the page cache.
    if _IN_MEMORY.is_dir() and shutil.disk_usage(_IN_MEMORY).free > 14 * scale.image:
        return _IN_MEMORY
    return directory


Case = Callable[[Bench, Record], None]


def topics(scale: Scale) -> list[dict[str, Case]]:
    """The cases of a scale; those of one topic share what they need."""
    small, *_ = scale.guests
    found: list[dict[str, Case]] = [
        {
            "sequential": lambda b, r: read_cases.sequential(b.images, r),
            "random": lambda b, r: read_cases.random_two_cpus(b.images, r),
            "random-one-cpu": lambda b, r: read_cases.random_one_cpu(b.images, r),
            "threads": lambda b, r: read_cases.threads(b.images, r),
            "cached": lambda b, r: read_cases.cached(b.images, r),
            "drop-behind": lambda b, r: read_cases.drop_behind(b.images, r),
            "slow-store": lambda b, r: read_cases.slow_store(b.images, r),
            "rediff": lambda b, r: read_cases.rediff(b.memory, b.scale, r),
            "faults": lambda b, r: fault_cases.faults(b.images, r),
        },
        {f"flatten-{kind}": partial(_flatten, kind) for kind in scale.filesystems},
        {
            "mount-time": lambda b, r: mount_cases.mount_time(b.store, b.scale, r),
            "reads-go-on": lambda b, r: mount_cases.reads_go_on(b.store, b.scale, r),
            "memory": lambda b, r: mount_cases.memory(b.store, b.scale, r),
            "kills": lambda b, r: mount_cases.kills(b.store, b.scale, r),
        },
        {"index": lambda b, r: mount_cases.index(b.scale, r)},
        {
            f"restore-{small}": partial(_restore, small),
            "restore-readahead": lambda b, r: restore_cases.readahead(b.guest(small), b.scale, r),
            "many": lambda b, r: restore_cases.many(b.guest(small), b.scale, r),
        },
    ]
    found.append(
        {
            "firecracker": lambda b, r: firecracker_cases.one(b, b.scale, r),
            "firecracker-many": lambda b, r: firecracker_cases.many(b, b.scale, r),
        }
    )
    found += [{f"restore-{size}": partial(_restore, size)} for size in scale.guests[1:]]
    return found


def _flatten(kind: str, bench: Bench, record: Record) -> None:
    write_cases.flatten(bench.memory, bench.scale, kind, record)


def _restore(size: int, bench: Bench, record: Record) -> None:
    restore_cases.restore(bench.guest(size), bench.scale, record, bench.memory)
