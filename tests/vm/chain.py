"""A snapshot chain taken from a running VM."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vm import qemu
from tests.vm.guest import Guest, make_guest

PAGE = 4096
TAGS = ("boot", "work", "more")
TICK = r"tick (\d+) nonce (\w+)"

_ZEROS = bytes(PAGE)
_BOOT_TIMEOUT = 120.0
_ANSWER_TIMEOUT = 60.0


@dataclass(frozen=True)
class Snapshot:
    """One moment of the VM, stopped."""

    tag: str
    layer: Path
    """The layer in the store: the full image for the first, a sparse diff for the others."""
    state: Path
    """The device state beside it, without RAM."""
    ram: Path
    """The truth: the VM's whole RAM file, copied."""
    nonce: str
    """What the guest drew at boot."""
    tick: int
    """The last tick that the guest had printed."""
    sums: dict[str, str]
    """SHA-256 of each file in the guest's tmpfs."""
    zeroed: int
    """How many pages had content in the snapshot before and are zero in this one."""


@dataclass(frozen=True)
class VmChain:
    """The store, what is in it, and the guest that it was taken from."""

    guest: Guest
    store: Path
    snapshots: tuple[Snapshot, ...]


def build_chain(
    directory: Path, tags: Sequence[str] = TAGS, machine: qemu.Machine | None = None
) -> VmChain:
    """Boot a VM and take snapshots of it: the first as it is, each other after the work of its tag.

    Everything is written below the existing, empty `directory`; the store holds the layers and the
    device states only, in the numbered layout. QEMU is gone on return. Raises
    GuestUnavailableError where the guest cannot be had, QemuError when the VM misbehaves.
    """
    qemu.version()
    guest = make_guest(directory)
    store = directory / "store"
    store.mkdir()
    live = directory / "ram"
    snapshots: list[Snapshot] = []
    with qemu.boot(guest, live, machine or qemu.Machine()) as vm:
        nonce = vm.console.wait_for(r"nonce drawn (\w+)", _BOOT_TIMEOUT)[1]
        vm.console.wait_for("ready", _ANSWER_TIMEOUT)
        for number, tag in enumerate(tags):
            if number:
                ask(vm, tag)
            sums = ask_sums(vm)
            vm.console.wait_for(TICK, _ANSWER_TIMEOUT)
            vm.execute("stop")
            vm.console.drain()
            state = store / f"{number:03}-{tag}.vmstate"
            vm.save_state(state)
            ram = directory / f"ram-{number}"
            _copy(live, ram)
            layer = store / f"{number:03}-{tag}.mem"
            zeroed = write_layer(snapshots[-1].ram if snapshots else None, ram, layer)
            tick = last_tick(vm)
            snapshots.append(Snapshot(tag, layer, state, ram, nonce, tick, sums, zeroed))
            vm.execute("cont")
    live.unlink()
    return VmChain(guest, store, tuple(snapshots))


def ask(vm: qemu.Vm, command: str) -> list[str]:
    """Have the guest do `command`; the lines that it printed meanwhile."""
    start = len(vm.console.lines)
    vm.console.send(command)
    vm.console.wait_for(f"done {command}", _ANSWER_TIMEOUT)
    return vm.console.lines[start:]


def ask_sums(vm: qemu.Vm) -> dict[str, str]:
    """The SHA-256 of each file in the guest's tmpfs, by name."""
    words = [line.split() for line in ask(vm, "sums")]
    return {word[1]: word[2] for word in words if word[0] == "sum"}


def last_tick(vm: qemu.Vm) -> int:
    """The number in the last tick line read from the console."""
    ticks = [line.split() for line in vm.console.lines if line.startswith("tick ")]
    return int(ticks[-1][1])


def write_layer(before: Path | None, after: Path, layer: Path) -> int:
    """Write the pages in which `after` differs from `before` to the sparse file `layer`.

    With no `before` the layer is the full image: pages that are zero are left out of it. A page
    that became zero is written, as zeros; the result is the number of those.
    """
    zeroed = 0
    with after.open("rb") as new, layer.open("xb") as target:
        target.truncate(after.stat().st_size)
        old = before.open("rb") if before else None
        try:
            for offset in range(0, after.stat().st_size, PAGE):
                page = new.read(PAGE)
                if page != (old.read(PAGE) if old else _ZEROS):
                    os.pwrite(target.fileno(), page, offset)
                    zeroed += page == _ZEROS
        finally:
            if old:
                old.close()
        os.fsync(target.fileno())
    return zeroed


def _copy(source: Path, target: Path) -> None:
    subprocess.run(
        ["cp", "--sparse=always", source, target], check=True, capture_output=True, timeout=60
    )
