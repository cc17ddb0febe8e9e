"""Real Firecrackers that restore from the flattened image and from views of a chain."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean

import diffmergefs as package
from tests.bench.goals import (
    CACHED,
    COLD,
    COLD_BESIDE,
    FLATTEN_FIRST,
    PSS,
    RECORDED,
    REPLY,
    SUM,
    WARM,
)
from tests.bench.images import Chain, aged
from tests.bench.measure import (
    MIB,
    Contestant,
    Figures,
    NotMeasured,
    Record,
    Scale,
    alternate,
    drop,
    say,
    touch_free,
    warm,
)
from tests.bench.programs import read_through, run
from tests.bench.restore_cases import have_fusectl, wait_for_record
from tests.bench.servers import Server, diffmergefs
from tests.vm import firecracker, snapshots
from tests.vm.firecracker import REGION_SIZE, FirecrackerUnavailableError, Guest

_MEBIBYTES = 256


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


def take_apart(directory: Path) -> MicroVm:
    """Start a guest and take a chain of it; NotMeasured where Firecracker cannot be had."""
    try:
        programs = firecracker.fetched()
    except FirecrackerUnavailableError as error:
        raise NotMeasured(f"no Firecracker: {error}") from error
    say(f"    starting a microVM of {_MEBIBYTES} MiB")
    directory.mkdir()
    kernel = firecracker.make_kernel(directory / "vmlinux")
    guest = snapshots.boot(programs, directory, kernel, _MEBIBYTES)
    try:
        base, *diffs = snapshots.take_chain(guest, directory / "store", truth=False)
        answers = guest.ask("i", "WHO"), guest.ask("s", "SUM")
    finally:
        guest.end()
    last, flat = diffs[-1], directory / "flat.mem"
    chain = Chain(base.memory, tuple(diff.memory for diff in diffs))
    _flatten(chain, flat)
    run(["sync", *chain.layers, flat])
    for path in (*chain.layers, flat, last.state):
        aged(path)
    return MicroVm(programs, directory, chain, flat, last.state, answers)


def one(microvm: MicroVm, scale: Scale, record: Record) -> None:
    """One VM at a time."""
    _compare(microvm, 1, scale, record)


def many(microvm: MicroVm, scale: Scale, record: Record) -> None:
    """VMs that are restored at once from one memory."""
    record.facts["VMs at once"] = scale.together
    _compare(microvm, scale.together, scale, record)


def _compare(microvm: MicroVm, count: int, scale: Scale, record: Record) -> None:
    version = run([microvm.programs / "firecracker", "--version"])
    record.facts["Firecracker"] = version.split("\n")[0].removeprefix("Firecracker v")
    record.facts["guest MiB"] = _MEBIBYTES

    def contestants(memories: list[Memory]) -> list[Contestant]:
        return [Contestant(m.name, partial(_restore, microvm, m, count)) for m in memories]

    with ExitStack() as stack:
        cold = stack.enter_context(microvm.view("cold"))
        cached = stack.enter_context(microvm.view("cached"))
        run(["cmp", microvm.flat, cold.file])
        read_through(cached.file)
        memories = [
            Memory(WARM, microvm.flat),
            Memory(CACHED, cached.file),
            Memory(COLD, cold.file, before=partial(_cool, cold)),
        ]
        try:
            recorded = _recorded(stack, microvm)
            memories.append(Memory(RECORDED, recorded.file, before=partial(_cool, recorded)))
        except Exception as error:
            record.miss(RECORDED, error)
        ready = partial(_ready, microvm, count, scale)
        alternate(record, contestants(memories), scale.restore_rounds, ready)
        # Apart: what a copy leaves to do would be in the others' numbers.
        out = microvm.directory / "out.mem"
        beside = [
            Memory(COLD_BESIDE, cold.file, before=partial(_cool, cold)),
            Memory(
                FLATTEN_FIRST, out, make=partial(_flatten, microvm.chain, out), after=out.unlink
            ),
        ]
        alternate(record, contestants(beside), scale.rounds, ready)


def _restore(microvm: MicroVm, memory: Memory, count: int) -> Figures:
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


def _ready(microvm: MicroVm, count: int, scale: Scale) -> None:
    warm(*microvm.chain.layers, microvm.flat)
    if scale.holds_memory:
        touch_free(_MEBIBYTES * MIB + 2 * count * REGION_SIZE)


def _cool(view: Server) -> None:
    drop(view.file)
    # That opened the file: what it set off, such as a prefetch, ends with its close.
    time.sleep(0.05)


def _recorded(stack: ExitStack, microvm: MicroVm) -> Server:
    # A view that prefetches what one restore has touched.
    sets = Path(tempfile.mkdtemp(prefix="working-sets-", dir=microvm.directory))
    where = f"--working-set-dir={sets}"
    with microvm.view("record", "--record", where) as recording:
        _restore(microvm, Memory(RECORDED, recording.file), 1)
        wait_for_record(sets)
    have_fusectl(stack)
    return stack.enter_context(microvm.view("prefetch", "--prefetch=notify", where))


def _flatten(chain: Chain, out: Path) -> None:
    # Without the start of a Python of its own, which the command would add.
    image = package.open_chain(str(chain.base), [str(diff) for diff in chain.diffs])
    with image.view as view:
        package.flatten(view, out)


def _pss(pid: int) -> int:
    # Of its largest mapping, in bytes: the guest's memory.
    found = largest = 0
    for line in (
        Path(f"/proc/{pid}/smaps").read_text(encoding="ascii", errors="replace").split("\n")
    ):
        name, _, value = line.partition(":")
        if name == "Size":
            size = int(value.split()[0])
            is_largest = size > largest
            largest = max(size, largest)
        elif name == "Pss" and is_largest:
            found = int(value.split()[0]) * 1024
    return found
