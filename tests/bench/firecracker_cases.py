"""Real Firecrackers that restore from the flattened image and from views of a chain."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

from tests.bench import page_servers
from tests.bench.goals import (
    CACHED,
    COLD,
    COLD_BESIDE,
    FLATTEN_FIRST,
    RECORDED,
    WARM,
)
from tests.bench.measure import (
    MIB,
    Contestant,
    Record,
    Scale,
    alternate,
    drop,
    touch_free,
    warm,
)
from tests.bench.microvms import MEBIBYTES, Memory, MicroVm, flatten, restore
from tests.bench.programs import read_through, run
from tests.bench.restore_cases import have_fusectl, wait_for_record
from tests.bench.servers import Server
from tests.vm.firecracker import REGION_SIZE


class Guests(Protocol):
    """The guests that are restored, made when they are asked for."""

    @property
    def microvm(self) -> MicroVm:
        """With pages of 4 KiB."""

    @property
    def huge_microvm(self) -> MicroVm:
        """With pages of 2 MiB."""


def one(guests: Guests, scale: Scale, record: Record) -> None:
    """One VM at a time."""
    _compare(guests, 1, scale, record)


def many(guests: Guests, scale: Scale, record: Record) -> None:
    """VMs that are restored at once from one memory."""
    record.facts["VMs at once"] = scale.together
    _compare(guests, scale.together, scale, record)


def _compare(guests: Guests, count: int, scale: Scale, record: Record) -> None:
    microvm = guests.microvm
    version = run([microvm.programs / "firecracker", "--version"])
    record.facts["Firecracker"] = version.split("\n")[0].removeprefix("Firecracker v")
    record.facts["guest MiB"] = MEBIBYTES

    def contestants(memories: list[Memory]) -> list[Contestant]:
        return [Contestant(m.name, partial(restore, m, count)) for m in memories]

    with ExitStack() as stack:
        cold = stack.enter_context(microvm.view("cold"))
        cached = stack.enter_context(microvm.view("cached"))
        run(["cmp", microvm.flat, cold.file])
        read_through(cached.file)
        memories = [
            Memory(microvm, WARM, microvm.flat),
            Memory(microvm, CACHED, cached.file),
            Memory(microvm, COLD, cold.file, before=partial(_cool, cold)),
        ]
        sets = Path(tempfile.mkdtemp(prefix="working-sets-", dir=microvm.directory))
        try:
            recorded = _recorded(stack, microvm, sets)
            memories.append(
                Memory(microvm, RECORDED, recorded.file, before=partial(_cool, recorded))
            )
        except Exception as error:
            record.miss(RECORDED, error)
        memories += page_servers.memories(
            stack, microvm, lambda: guests.huge_microvm, sets, count, record
        )
        layers = {p for m in memories for p in (*m.vm.chain.layers, m.vm.flat)}
        ready = partial(_ready, sorted(layers), count, scale)
        alternate(record, contestants(memories), scale.restore_rounds, ready)
        # Apart: what a copy leaves to do would be in the others' numbers.
        out = microvm.directory / "out.mem"
        beside = [
            Memory(microvm, COLD_BESIDE, cold.file, before=partial(_cool, cold)),
            Memory(
                microvm,
                FLATTEN_FIRST,
                out,
                make=partial(flatten, microvm.chain, out),
                after=partial(out.unlink, missing_ok=True),
            ),
        ]
        alternate(record, contestants(beside), scale.rounds, ready)


def _ready(files: Sequence[Path], count: int, scale: Scale) -> None:
    warm(*files)
    if scale.holds_memory:
        touch_free(MEBIBYTES * MIB + 2 * count * REGION_SIZE)


def _cool(view: Server) -> None:
    drop(view.file)
    # That opened the file: what it set off, such as a prefetch, ends with its close.
    time.sleep(0.05)


def _recorded(stack: ExitStack, microvm: MicroVm, sets: Path) -> Server:
    # A view that prefetches what one restore has touched.
    where = f"--working-set-dir={sets}"
    with microvm.view("record", "--record", where) as recording:
        restore(Memory(microvm, RECORDED, recording.file), 1)
        wait_for_record(sets)
    have_fusectl(stack)
    return stack.enter_context(microvm.view("prefetch", "--prefetch=notify", where))
