"""Guests that are stopped as a chain of snapshots, and started from a memory file again."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench import newqemu
from tests.bench.images import Chain, aged
from tests.bench.measure import MIB, PAGE, NotMeasured, say
from tests.bench.programs import compiled, run
from tests.vm import chain as vmchain
from tests.vm import qemu
from tests.vm.guest import Guest, make_guest

_ANSWER_SECONDS = 60
_BOOT_SECONDS = 180
_COMMANDS = ("work", "more")


@dataclass(frozen=True)
class Stopped:
    """A guest that was stopped twice after its start, as a chain, with its device state."""

    guest: Guest
    machine: qemu.Machine
    chain: Chain
    flat: Path
    state: Path

    @property
    def read_only(self) -> bool:
        """Whether this QEMU maps the memory read-only."""
        return qemu.version(self.machine.program) >= newqemu.READ_ONLY_SINCE

    @property
    def options(self) -> tuple[str, ...]:
        """The mount options that this QEMU needs."""
        return () if self.read_only else ("--open-rw",)

    def small_pages(self) -> Stopped:
        """The same, but QEMU does not ask for huge pages."""
        shim = {"LD_PRELOAD": str(compiled("nohuge", shared=True))}
        return replace(self, machine=replace(self.machine, environment=shim))


def stop_guest(directory: Path, mebibytes: int) -> Stopped:
    """Boot a guest and take its memory: a full image, as a VMM writes it, and two diffs.

    All of the full image is data, zeros too: 'flatten' then copies all of it.
    """
    directory.mkdir()
    say(f"    booting a guest of {mebibytes} MiB")
    machine = newqemu.machine(mebibytes)
    guest = make_guest(directory)
    live, flat, state = (directory / name for name in ("live", "flat.mem", "vmstate"))
    layers: list[Path] = []
    with qemu.boot(guest, live, machine) as vm:
        vm.console.wait_for("ready", _BOOT_SECONDS)
        for command in ("", *_COMMANDS):
            if command:
                vmchain.ask(vm, command)
            vm.console.wait_for(vmchain.TICK, _ANSWER_SECONDS)
            vm.execute("stop")
            vm.console.drain()
            state.unlink(missing_ok=True)
            vm.save_state(state)
            layers.append(directory / f"{len(layers):03}.mem")
            if command:
                _write_difference(flat, live, layers[-1])
            else:
                run(["cp", "--sparse=never", live, layers[0]])
                run(["cp", "--sparse=never", live, flat])
            vm.execute("cont")
    live.unlink()
    run(["sync", *layers, flat])
    for path in (*layers, flat, state):
        aged(path)
    return Stopped(guest, machine, Chain(layers[0], tuple(layers[1:])), flat, state)


def _write_difference(before: Path, after: Path, diff: Path) -> None:
    # The pages in which `after` differs go to the diff, and to `before`, which then equals it.
    size = after.stat().st_size
    with after.open("rb") as new, before.open("r+b") as old, diff.open("xb", buffering=0) as target:
        target.truncate(size)
        left = mmap.mmap(old.fileno(), size)
        right = mmap.mmap(new.fileno(), size, prot=mmap.PROT_READ)
        with left, right:
            for start in range(0, size, MIB):
                if left[start : start + MIB] == right[start : start + MIB]:
                    continue
                for at in range(start, min(size, start + MIB), PAGE):
                    page = right[at : at + PAGE]
                    if left[at : at + PAGE] != page:
                        os.pwrite(target.fileno(), page, at)
                        left[at : at + PAGE] = page


def first_reply(stopped: Stopped, ram: Path, began: float | None = None) -> float:
    """Seconds from the start of QEMU (or from `began`) to the guest's first answer."""
    with answering(stopped, ram, began) as (seconds, _):
        return seconds


@contextmanager
def answering(
    stopped: Stopped, ram: Path, began: float | None = None
) -> Iterator[tuple[float, qemu.Vm]]:
    start = time.perf_counter() if began is None else began
    with qemu.restore(stopped.guest, ram, stopped.state, stopped.machine) as vm:
        vm.console.send("hello")
        vm.execute("cont")
        vm.console.wait_for("done hello", _ANSWER_SECONDS)
        seconds = time.perf_counter() - start
        if any("Linux version" in line for line in vm.console.lines):
            raise NotMeasured("the guest booted anew")
        yield seconds, vm
