"""The recipes of docs/recipes.md that need a guest: its commands are typed, in their order."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.project.test_docs import Sandbox, blocks_of, sandbox
from tests.project.test_recipes import RECIPE, run, run_block
from tests.support import mounttable
from tests.vm import firecracker
from tests.vm.chain import TICK
from tests.vm.guest import GuestUnavailableError, make_guest
from tests.vm.qemu import Console

pytestmark = pytest.mark.timeout(240)

_PROMPT = b"(qemu) "
_SECONDS = 60


class Monitor:
    """A QEMU that was started with `-monitor stdio`, and the console of its guest."""

    def __init__(self, command: str, directory: Path) -> None:
        self._process = subprocess.Popen(
            shlex.split(command.replace("\\\n", " ")),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=directory,
            bufsize=0,
        )
        self._answer()
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + _SECONDS
        while True:
            with suppress(OSError):
                self._socket.connect(str(directory / "console.sock"))
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.console = Console(self._socket)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        said = b""
        while not said.endswith(_PROMPT):
            part = self._process.stdout.read(4096)
            assert part, f"QEMU has ended: {said!r}"
            said += part
        # It repeats what it is told, with the escapes of a terminal.
        return said.split(b"\x1b[K")[-1].decode()

    def type(self, line: str) -> None:
        """Type a command of the monitor; `info migrate` until the state is loaded."""
        assert self._process.stdin is not None
        if line == "quit":
            self._process.stdin.write(b"quit\n")
            assert self._process.wait(_SECONDS) == 0
            return
        deadline = time.monotonic() + _SECONDS
        while True:
            self._process.stdin.write(line.encode() + b"\n")
            said = self._answer()
            if line != "info migrate":
                assert said.split() == ["(qemu)"], said
                return
            if "completed" in said:
                return
            assert time.monotonic() < deadline, said
            time.sleep(0.1)

    def ask(self, command: str) -> list[str]:
        """What the guest prints when it is given a command of its own."""
        start = len(self.console.lines)
        self.console.send(command)
        self.console.wait_for(f"done {command}", _SECONDS)
        return [line for line in self.console.lines[start:] if line.startswith("sum ")]

    def end(self) -> None:
        """Kill it if it still runs."""
        self._process.kill()
        self._process.communicate()
        self._socket.close()


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A sandbox in which the commands of the QEMU recipe were run, with a guest that works."""
    root = tmp_path_factory.mktemp("recipes")
    try:
        with sandbox(root) as found:
            (root / "srv/guest/layers").mkdir(parents=True)
            guest = make_guest(found.work)
            (found.work / "vmlinuz").symlink_to(guest.kernel)
            guest.initramfs.rename(found.work / "initrd.img")
            run_qemu(found)
            yield found
    except GuestUnavailableError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(root)


def run_qemu(box: Sandbox) -> None:
    vm: Monitor | None = None
    sums: list[str] = []
    tick, nonce = 0, ""
    try:
        for block in blocks_of(RECIPE["QEMU"]):
            if block.language == "console":
                run_block(box, block)
            elif block.language == "sh":
                if vm is not None:
                    vm.end()
                vm = Monitor(box.inside(block.text), box.work)
                if "-incoming" not in block.text:
                    vm.console.wait_for("ready", 120)
            else:
                assert vm is not None
                for line in block.lines:
                    command = box.inside(line.removeprefix(_PROMPT.decode()))
                    restored = "info migrate" in block.text
                    if command == "stop" and "cont" in block.text:
                        vm.ask("work")
                        sums = vm.ask("sums")
                        found = vm.console.wait_for(TICK, _SECONDS)
                        tick, nonce = int(found[1]), found[2]
                    if command == "quit" and restored:
                        found = vm.console.wait_for(TICK, _SECONDS)
                        assert int(found[1]) in (tick, tick + 1, tick + 2) and found[2] == nonce
                        assert vm.ask("sums") == sums
                    vm.type(command)
        assert sums
        box.assert_clean()
    finally:
        if vm is not None:
            vm.end()


def test_a_qemu_guest_is_taken_apart_and_restored(box: Sandbox) -> None:
    layers = Path(box.inside("/srv/guest/layers"))
    assert sorted(path.name for path in layers.iterdir()) == [
        "000-boot.mem",
        "000-boot.vmstate",
        "001-work.mem",
        "001-work.mem.bmap",
        "001-work.vmstate",
    ]


@pytest.mark.parametrize("title", ["gdb on a view", "drgn on a view", "volatility3 on a view"])
def test_a_program_reads_the_guest_in_the_view(box: Sandbox, title: str) -> None:
    try:
        run(box, RECIPE[title])
    finally:
        mounttable.unmount_below(str(box.root))


def test_a_firecracker_guest_is_taken_apart_and_restored_three_times(public_path: Path) -> None:
    folder = firecracker.programs()
    guests: list[firecracker.Guest] = []
    states: list[tuple[str, str]] = []
    uids: list[int] = []
    with sandbox(public_path, filled=False) as box:
        firecracker.make_kernel(box.work / "vmlinux")
        texts = [RECIPE["Firecracker"], RECIPE["Firecracker in its jailer"]]
        texts.append(RECIPE["Firecracker with a page server"])
        try:
            for block in [block for text in texts for block in blocks_of(text)]:
                if block.language == "sh":
                    guests.append(firecracker.Guest(box.inside(block.text), box.work, str(folder)))
                    continue
                if block.language != "console":
                    continue
                if " umount " in block.text or "kill " in block.text:
                    guests[-1].end()
                if '"Diff"' in block.text:
                    states.append(guests[0].state())
                    for command in "dz":
                        guests[0].ask(command, "DONE")
                    states.append(guests[0].state())
                for socket in re.findall(r"\$ api (\S+)", block.text):
                    guests[-1].wait_for_socket(box.work / box.inside(socket))
                run_block(box, block)
                if "InstanceStart" in block.text:
                    guests[0].wait_for("READY")
                if "/snapshot/load" in block.text:
                    assert guests[-1].state() == states[-1] != states[0]
                    uids.append(guests[-1].uid())
            assert uids == [0, 1234, 0]
        finally:
            for guest in guests:
                guest.end()
        box.assert_clean()
