"""Real Firecrackers that restore from the flattened image and from views of a chain."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

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
        try:
            recorded = _recorded(stack, microvm)
            memories.append(
                Memory(microvm, RECORDED, recorded.file, before=partial(_cool, recorded))
            )
        except Exception as error:
            record.miss(RECORDED, error)
        ready = partial(_ready, microvm, count, scale)
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


def _ready(microvm: MicroVm, count: int, scale: Scale) -> None:
    warm(*microvm.chain.layers, microvm.flat)
    if scale.holds_memory:
        touch_free(MEBIBYTES * MIB + 2 * count * REGION_SIZE)


def _cool(view: Server) -> None:
    drop(view.file)
    # That opened the file: what it set off, such as a prefetch, ends with its close.
    time.sleep(0.05)


def _recorded(stack: ExitStack, microvm: MicroVm) -> Server:
    # A view that prefetches what one restore has touched.
    sets = Path(tempfile.mkdtemp(prefix="working-sets-", dir=microvm.directory))
    where = f"--working-set-dir={sets}"
    with microvm.view("record", "--record", where) as recording:
        restore(Memory(microvm, RECORDED, recording.file), 1)
        wait_for_record(sets)
    have_fusectl(stack)
    return stack.enter_context(microvm.view("prefetch", "--prefetch=notify", where))
