"""Guests of real Firecrackers, taken apart into a chain and restored from several memories."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import diffmergefs as package
from tests.bench.goals import PSS, REPLY, SUM
from tests.bench.images import Chain, aged
from tests.bench.measure import MIB, Figures, NotMeasured, say
from tests.bench.programs import run
from tests.bench.servers import Server, diffmergefs
from tests.vm import firecracker, snapshots
from tests.vm.firecracker import FirecrackerUnavailableError, Guest

MEBIBYTES = 256


@dataclass(frozen=True)
class MicroVm:
    """A guest that Firecracker has taken apart into a chain, and what it was at its end."""

    programs: Path
    directory: Path
    chain: Chain
    flat: Path
    state: Path
    answers: tuple[str, str]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @contextmanager
    def firecracker(self) -> Iterator[Guest]:
        """A Firecracker that waits for its snapshot. Its guest gets two commands at once."""
        guest = firecracker.start(self.programs, self.directory, f"vm{next(self.numbers)}")
        try:
            guest.type("is")
            yield guest
        finally:
            guest.end()

    def view(self, name: str, *options: str) -> AbstractContextManager[Server]:
        """A mount of the chain."""
        return diffmergefs(self.directory, self.chain, *options, name=name)


@dataclass(frozen=True)
class Memory:
    """One kind of memory that VMs are restored from."""

    vm: MicroVm
    name: str
    path: Path
    """What `/snapshot/load` is told."""
    kind: str = "File"
    """The type of its backend: `Uffd` if the path is a page server's socket."""
    before: Callable[[], object] = lambda: None
    """Called before the clock starts."""
    make: Callable[[], object] = lambda: None
    """Called when the clock has started: it makes the file."""
    after: Callable[[], object] = lambda: None
    """Called when all VMs have ended."""


def take_apart(directory: Path, *, huge: bool = False) -> MicroVm:
    """Start a guest and take a chain of it; NotMeasured where Firecracker cannot be had.

    One with `huge` pages can be restored with huge pages only, which must be reserved.
    """
    try:
        programs = firecracker.fetched()
    except FirecrackerUnavailableError as error:
        raise NotMeasured(f"no Firecracker: {error}") from error
    say(f"    starting a microVM of {MEBIBYTES} MiB")
    directory.mkdir()
    kernel = firecracker.make_kernel(directory / "vmlinux")
    guest = snapshots.boot(programs, directory, kernel, MEBIBYTES, huge=huge)
    try:
        base, *diffs = snapshots.take_chain(guest, directory / "store", truth=False)
        answers = guest.ask("i", "WHO"), guest.ask("s", "SUM")
    finally:
        guest.end()
    last, flat = diffs[-1], directory / "flat.mem"
    chain = Chain(base.memory, tuple(diff.memory for diff in diffs))
    flatten(chain, flat)
    run(["sync", *chain.layers, flat])
    for path in (*chain.layers, flat, last.state):
        aged(path)
    return MicroVm(programs, directory, chain, flat, last.state, answers)


def restore(memory: Memory, count: int) -> Figures:
    """Restore so many VMs at once: the mean times of one, and of several the Pss of a memory."""
    microvm = memory.vm
    with ExitStack() as stack:
        guests = [stack.enter_context(microvm.firecracker()) for _ in range(count)]
        memory.before()
        stack.callback(memory.after)
        began = time.perf_counter()
        memory.make()

        def load(guest: Guest) -> tuple[float, float]:
            guest.load(microvm.state, memory.path, kind=memory.kind)
            who = guest.wait_for("WHO")
            replied = time.perf_counter()
            total = guest.wait_for("SUM")
            summed = time.perf_counter()
            # It would wait for its console in a loop, and take the others' time.
            guest.pause()
            if (who, total) != microvm.answers:
                raise NotMeasured(f"another guest: {who}, {total}")
            return replied - began, summed - began

        with ThreadPoolExecutor(count) as threads:
            times = list(threads.map(load, guests))
        found = {
            f"{memory.name}: {REPLY}": ("s", mean(replied for replied, _ in times)),
            f"{memory.name}: {SUM}": ("s", mean(summed for _, summed in times)),
        }
        if count > 1:
            pss = mean(_pss(guest.pid) for guest in guests)
            found[f"{memory.name}: {PSS}"] = ("MiB", pss / MIB)
        return found


def flatten(chain: Chain, out: Path) -> None:
    """Flatten, without the start of a Python of its own, which the command would add."""
    image = package.open_chain(str(chain.base), [str(diff) for diff in chain.diffs])
    with image.view as view:
        package.flatten(view, out)


def _pss(pid: int) -> int:
    # Of its largest mapping, in bytes: the guest's memory. Huge pages have lines of their own.
    found = largest = 0
    for line in (
        Path(f"/proc/{pid}/smaps").read_text(encoding="ascii", errors="replace").split("\n")
    ):
        name, _, value = line.partition(":")
        if name == "Size":
            size = int(value.split()[0])
            is_largest = size > largest
            if is_largest:
                largest, found = size, 0
        elif name in ("Pss", "Private_Hugetlb") and is_largest:
            found += int(value.split()[0]) * 1024
    return found
