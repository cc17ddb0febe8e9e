"""For tests of a running daemon: waiting for what it does, and having it do odd things."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

_DEADLINE_SECONDS = 60

_HOLDER = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    view = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
view.madvise(mmap.MADV_RANDOM)
print(flush=True)
for line in sys.stdin:
    start, length = map(int, line.split())
    print(view[start : start + length].hex(), flush=True)
"""


def until(answer: Callable[[], T], what: str) -> T:
    """The first true answer; asks again and again, and fails after many seconds."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not (found := answer()):
        assert time.monotonic() < deadline, f"waited {_DEADLINE_SECONDS} s in vain: {what}"
        time.sleep(0.02)
    return found


def until_equal(answer: Callable[[], object], expected: object) -> None:
    """Ask again and again until the answer is the expected one."""
    until(lambda: answer() == expected, f"{expected!r}")


def error_of(path: Path) -> int | None:
    """The errno with which reading the file fails, or None if it does not."""
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno
    return None


def patch_children(patch: pytest.MonkeyPatch, directory: Path, code: str) -> None:
    """Have every Python process started from now on run this code first."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(code, encoding="utf-8")
    known = os.environ.get("PYTHONPATH")
    patch.setenv("PYTHONPATH", f"{directory}:{known}" if known else str(directory))


@contextmanager
def readers(path: Path, gate: Gate, count: int = 8) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that read the file to its end. They all go on once this ends."""
    command = ["cat", str(path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        yield started
    finally:
        gate.open()
        for process in started:
            process.kill()
            process.communicate(timeout=60)


class Gate:
    """Where a patched process waits until the test lets it go on.

    Once the gate is open, waiting there returns at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        os.mkfifo(path)
        self._fd = -1

    def patch(self, patch: pytest.MonkeyPatch, code: str) -> None:
        """`patch_children` with this code, which may call `wait_at_gate`."""
        patch_children(patch, self._path.with_name("patch"), self.code + code)

    @property
    def code(self) -> str:
        """A function `wait_at_gate` for that process."""
        return (
            "def wait_at_gate():\n"
            "    try:\n"
            f"        with open({str(self._path)!r}, 'rb') as gate:\n"
            "            gate.read()\n"
            "    except FileNotFoundError:\n"
            "        pass\n"
        )

    def wait_until_reached(self) -> None:
        """Return once somebody waits at the gate."""

        def reached() -> bool:
            try:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                return False
            return True

        if self._fd < 0:
            until(reached, "nobody came to the gate")

    def open(self) -> None:
        """Let everybody go on, now and later."""
        self._path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def note_calls(
    patch: pytest.MonkeyPatch, directory: Path, function: str, gate: Gate | None = None
) -> Path:
    """A file with a line for each call of this function in the processes started from now on.

    The function is named with its module and takes a layer first, whose path the line has. With
    `gate`, which lies in the directory too, each call waits there.
    """
    module, _, name = function.rpartition(".")
    log = directory / "calls"
    log.touch()
    code = f"""
import {module} as module
def noted(layer, *arguments, known=module.{name}):
    with open({str(log)!r}, "a") as log:
        print(layer.path, file=log)
    {"wait_at_gate()" if gate else "pass"}
    return known(layer, *arguments)
module.{name} = noted
"""
    if gate:
        gate.patch(patch, code)
    else:
        patch_children(patch, directory / "patch", code)
    return log


class Holder:
    """Another process with a private mapping of a file, in which nothing was touched yet."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def read(self, start: int, length: int) -> bytes:
        """These bytes of its mapping; b"" if it died of it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{start} {length}\n")
        self.process.stdin.flush()
        return bytes.fromhex(self.process.stdout.readline())

    def end(self) -> None:
        """Give the mapping up."""
        self.process.kill()
        self.process.wait(60)


@contextmanager
def held(path: Path, enter: Sequence[str] = ()) -> Iterator[Holder]:
    """A process that maps the file privately, as a VMM does.

    `enter` is what stands before its command.
    """
    process = subprocess.Popen(
        [*enter, sys.executable, "-c", _HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        yield Holder(process)
    finally:
        process.kill()
        process.communicate()
