"""One QEMU process: its console, its monitor, and its device state saved and loaded."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from tests.vm.guest import Guest, GuestUnavailableError

RAM_SIZE = 128 << 20

_PROGRAM = "qemu-system-x86_64"
_QMP_TIMEOUT = 30.0


@dataclass(frozen=True)
class Machine:
    """Which QEMU runs the guest, and with how much memory.

    `firmware` are directories of its BIOS and option ROMs, where it is not installed in the usual
    place; `environment` is added to this process's own. `arguments` are the kernel's, beside those
    of every guest.
    """

    ram_size: int = RAM_SIZE
    program: str = _PROGRAM
    firmware: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: str = ""


_SMALL = Machine()


class QemuError(Exception):
    """QEMU ended, refused a command or kept the caller waiting; the message has what it said."""


class Console:
    """The host's end of the guest's serial console, read line by line."""

    def __init__(self, end: socket.socket) -> None:
        self.lines: list[str] = []
        """Every complete line that the guest has printed so far, as far as it has been read."""
        self._socket = end
        self._partial = b""
        self._seen = 0

    def send(self, line: str) -> None:
        """Type `line` and a newline."""
        self._socket.sendall(line.encode() + b"\n")

    def wait_for(self, pattern: str, timeout: float) -> re.Match[str]:
        """Read on to the next line that `pattern` matches in full; lines before it are passed over.

        Raises QemuError when `timeout` seconds pass or the guest is gone.
        """
        deadline = time.monotonic() + timeout
        while True:
            while self._seen < len(self.lines):
                self._seen += 1
                if match := re.fullmatch(pattern, self.lines[self._seen - 1]):
                    return match
            if not self._read(deadline - time.monotonic()):
                tail = "\n".join(self.lines[-20:])
                raise QemuError(f"no line {pattern!r} on the console, which ends in:\n{tail}")

    def drain(self) -> None:
        """Read what has been printed, without waiting for more."""
        while self._read(0):
            pass

    def _read(self, timeout: float) -> bool:
        if not select.select([self._socket], [], [], max(timeout, 0))[0]:
            return False
        chunk = self._socket.recv(65536)
        *complete, self._partial = (self._partial + chunk).split(b"\n")
        self.lines += [line.decode(errors="replace").rstrip("\r") for line in complete]
        return bool(chunk)


class Vm:
    """A guest under QEMU. Made by `boot` and `restore`, which also end it."""

    def __init__(self, console: Console, monitor: TextIO, pid: int) -> None:
        self.console = console
        self.pid = pid
        self._monitor = monitor
        self._monitor.readline()  # QMP's greeting
        self.execute("qmp_capabilities")
        # Guest RAM stays out of the device state: it is the memory file.
        self.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": "x-ignore-shared", "state": True}],
        )

    def execute(self, command: str, **arguments: object) -> Any:
        """Give one QMP command and return its result; QemuError when it fails."""
        request = json.dumps({"execute": command, "arguments": arguments})
        print(request, file=self._monitor, flush=True)
        while line := self._monitor.readline():
            reply = json.loads(line)
            if "error" in reply:
                raise QemuError(f"{command}: {reply['error']['desc']}")
            if "return" in reply:
                return reply["return"]
        raise QemuError(f"{command}: QEMU has ended")

    def save_state(self, path: Path) -> None:
        """Write the device state of the stopped guest to `path`; `cont` can follow."""
        self.execute("migrate", uri=f"exec:cat >{shlex.quote(str(path))}")
        self._wait_for_migration()

    def load_state(self, path: Path) -> None:
        """Take the device state over from `path`; the guest stays stopped."""
        self.execute("migrate-incoming", uri=f"exec:cat {shlex.quote(str(path))}")
        self._wait_for_migration()

    def _wait_for_migration(self) -> None:
        deadline = time.monotonic() + _QMP_TIMEOUT
        while (status := self.execute("query-migrate").get("status")) != "completed":
            if status in ("failed", "cancelled") or time.monotonic() > deadline:
                raise QemuError(f"the migration is {status!r}")
            time.sleep(0.002)


@contextmanager
def boot(guest: Guest, ram: Path, machine: Machine = _SMALL) -> Iterator[Vm]:
    """Start `guest` with the new file `ram` as its shared memory; QEMU is gone on leaving."""
    with _run(guest, machine, f"mem-path={ram},share=on") as vm:
        yield vm


@contextmanager
def restore(guest: Guest, ram: Path, state: Path, machine: Machine = _SMALL) -> Iterator[Vm]:
    """A stopped guest with the memory in `ram`, mapped private, and the device state in `state`.

    `ram` is never written. `guest` is the one that was booted: its option ROM is part of the
    device state, and a guest that rebooted would boot it again and say so on the console.
    """
    # QEMU before 8.2 makes ROM of a read-only backend: there the file is opened O_RDWR.
    access = "readonly=on,rom=off" if version(machine.program) >= (8, 2) else "readonly=off"
    # x-ignore-shared works for a private destination: what is in the stream is the source's say.
    backend = f"mem-path={ram},share=off,{access}"
    with _run(guest, machine, backend, "-S", "-incoming", "defer") as vm:
        vm.load_state(state)
        yield vm


@cache
def version(program: str = _PROGRAM) -> tuple[int, int]:
    """QEMU's version; GuestUnavailableError where it is not installed."""
    if shutil.which(program) is None:
        raise GuestUnavailableError(f"needs {program}")
    output = subprocess.run(
        [program, "--version"], check=True, capture_output=True, text=True, timeout=30
    ).stdout
    match = re.search(r"version (\d+)\.(\d+)", output)
    assert match is not None, output
    return int(match[1]), int(match[2])


@contextmanager
def _run(guest: Guest, machine: Machine, backend: str, *options: str) -> Iterator[Vm]:
    console, guest_console = socket.socketpair()
    monitor, guest_monitor = socket.socketpair()
    monitor.settimeout(_QMP_TIMEOUT)
    with console, monitor, guest_console, guest_monitor:
        command = [
            *(machine.program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *(word for path in machine.firmware for word in ("-L", path)),
            *("-machine", "pc,accel=tcg,memory-backend=ram", "-m", f"{machine.ram_size >> 20}M"),
            # RDRAND seeds the guest's generator: without it the nonce would wait for jitter.
            *("-cpu", "qemu64,+rdrand"),
            *("-object", f"memory-backend-file,id=ram,size={machine.ram_size},{backend}"),
            *("-kernel", str(guest.kernel), "-initrd", str(guest.initramfs)),
            *("-append", f"console=ttyS0 loglevel=6 panic=-1 {machine.arguments}"),
            *("-chardev", f"socket,id=console,fd={guest_console.fileno()}"),
            *("-serial", "chardev:console"),
            *("-chardev", f"socket,id=monitor,fd={guest_monitor.fileno()}"),
            *("-mon", "chardev=monitor,mode=control"),
            *options,
        ]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **machine.environment},
            pass_fds=(guest_console.fileno(), guest_monitor.fileno()),
        )
        # Ours are closed, so that the end of QEMU is the end of file on the other ends.
        guest_console.close()
        guest_monitor.close()
        try:
            with monitor.makefile("rw", encoding="utf-8") as lines:
                yield Vm(Console(console), lines, process.pid)
        except (QemuError, OSError) as error:
            process.kill()
            raise QemuError(f"{error}\n{process.communicate(timeout=30)[1]}") from error
        finally:
            process.kill()
            process.communicate(timeout=30)
