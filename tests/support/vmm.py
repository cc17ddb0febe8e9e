"""A process that plays Firecracker: guest memory that a page server fills, and commands for it.

`Vmm` starts this file as a program, which uses the standard library only. The program reads one
command per line, a JSON array of a name and arguments, and answers each with a line.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = 4096
HUGE = 2 << 20

_NUMBER = {"x86_64": 323, "aarch64": 282}.get(platform.machine(), 323)
_USER_MODE_ONLY = 1
_API, _REGISTER = 0xC018AA3F, 0xC020AA00
_EVENT_REMOVE = 1 << 3
_MADV_DONTNEED = 4
_SECONDS = 60.0


class Vmm:
    """Guest memory of `sizes`, one region each in this order of the image, in a process of its own.

    Without `events`, the server is not told of what is given away. The process runs as `user`.
    `read` and the like raise AssertionError if there is no answer in time; `is_stuck` is for
    those that are meant to wait.
    """

    def __init__(
        self, *sizes: int, page: int = PAGE, events: bool = True, user: int | None = None
    ) -> None:
        numbers = user or 0, page, _EVENT_REMOVE if events else 0, *sizes
        arguments = [sys.executable, "-I", __file__, *map(str, numbers)]
        self.process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._said = b""
        try:
            self.regions: list[dict[str, int]] = self._answer()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Vmm:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, *command: object) -> None:
        """Give a command without waiting for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    def ask(self, *command: object) -> Any:
        """The answer to a command."""
        self.send(*command)
        return self._answer()

    def answer(self) -> Any:
        """The answer to a command that was sent."""
        return self._answer()

    def connect(self, path: Path, *parts: str, fds: int = 1, after: int | None = None) -> None:
        """Connect to the socket, and send the message, by default that of Firecracker.

        It goes in these parts. The descriptor, `fds` times, goes with part `after`, by default
        with the last one.
        """
        text = parts or (json.dumps(self.regions),)
        self.ask("connect", str(path), list(text), fds, len(text) - 1 if after is None else after)

    def read(self, offset: int, length: int) -> bytes:
        """The guest's bytes from `offset` in its memory on."""
        return bytes.fromhex(self.ask("read", offset, length))

    def digest(self, offset: int, length: int) -> str:
        """The sha256 of the guest's bytes."""
        found: str = self.ask("digest", offset, length)
        return found

    def give_away(self, offset: int, length: int) -> None:
        """As a balloon does: these pages are not needed any more."""
        self.ask("give", offset, length)

    def is_closed(self) -> bool:
        """Whether the server ends the connection within some seconds."""
        found: bool = self.ask("closed")
        return found

    def is_stuck(self, seconds: float = 0.5) -> bool:
        """Whether there is no answer for so long."""
        assert self.process.stdout is not None
        return not self._said and not select.select([self.process.stdout], [], [], seconds)[0]

    def _answer(self) -> Any:
        output = self.process.stdout
        assert output is not None
        deadline = time.monotonic() + _SECONDS
        while b"\n" not in self._said:
            ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            part = output.read(1 << 20) if ready else b""
            assert part, f"no answer, status {self.process.poll()}: {self._said[:200]!r}"
            self._said += part
        line, _, self._said = self._said.partition(b"\n")
        return json.loads(line)


class _Program:
    def __init__(self, page: int, features: int, sizes: Sequence[int]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._fd = self._call(
            self._libc.syscall, _NUMBER, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY
        )
        self._ioctl(_API, struct.pack("QQQ", 0xAA, features, 0))
        self.regions: list[dict[str, int]] = []
        self._connection: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self._found: dict[int, Any] = {}
        offset = 0
        for size in sizes:
            start = self._map(size, page)
            self._ioctl(_REGISTER, struct.pack("QQQQ", start, size, 1, 0))
            region = {"base_host_virt_addr": start, "size": size, "offset": offset}
            self.regions.append({**region, "page_size": page, "page_size_kib": page})
            offset += size

    def _map(self, size: int, page: int) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0x40000 if page == HUGE else 0)
        found = self._libc.mmap(None, ctypes.c_size_t(size), 3, flags, -1, ctypes.c_long(0))
        if found in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        return int(found)

    def _ioctl(self, request: int, argument: bytes) -> None:
        buffer = ctypes.create_string_buffer(argument, len(argument))
        self._call(self._libc.ioctl, self._fd, ctypes.c_ulong(request), buffer)

    def _call(self, function: Any, *arguments: Any) -> int:
        found: int = function(*arguments)
        if found < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return found

    def _address(self, offset: int) -> int:
        for region in self.regions:
            if 0 <= offset - region["offset"] < region["size"]:
                return region["base_host_virt_addr"] + offset - region["offset"]
        raise ValueError(offset)

    def connect(self, path: str, parts: list[str], fds: int, after: int) -> None:
        self._connection = connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        for number, part in enumerate(parts):
            passed = [self._fd] * fds if number == after else []
            socket.send_fds(connection, [part.encode()], passed)
            time.sleep(0.02 if len(parts) < 20 else 0)

    def closed(self) -> bool:
        assert self._connection is not None
        self._connection.settimeout(30)
        try:
            return self._connection.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    def _bytes(self, offset: int, length: int) -> bytes:
        # By a C function that lets the other threads run meanwhile.
        room = (ctypes.c_char * length)()
        begin = ctypes.addressof(room)
        for place in range(offset, offset + length, PAGE):
            source, size = self._address(place), min(PAGE, offset + length - place)
            self._libc.memcpy(
                ctypes.c_void_p(begin + place - offset), ctypes.c_void_p(source), size
            )
        return room.raw

    def read(self, offset: int, length: int) -> str:
        return self._bytes(offset, length).hex()

    def digest(self, offset: int, length: int) -> str:
        found = hashlib.sha256()
        for start in range(offset, offset + length, 1 << 20):
            found.update(self._bytes(start, min(1 << 20, offset + length - start)))
        return found.hexdigest()

    def start(self, name: str, *arguments: Any) -> None:
        """Run a command in a thread; `join` gives the answers of all, in this order."""
        number = len(self._threads)

        def run() -> None:
            self._found[number] = getattr(self, name)(*arguments)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def join(self) -> list[Any]:
        for thread in self._threads:
            thread.join()
        found = [self._found[number] for number in range(len(self._threads))]
        self._threads.clear()
        return found

    def write(self, offset: int, text: str) -> None:
        data = bytes.fromhex(text)
        ctypes.memmove(self._address(offset), data, len(data))

    def give(self, offset: int, length: int) -> None:
        address, size = ctypes.c_void_p(self._address(offset)), ctypes.c_size_t(length)
        self._call(self._libc.madvise, address, size, _MADV_DONTNEED)

    def race(self, seconds: float, offset: int, length: int) -> int:
        """Give pages away and touch them, in threads; afterwards all of them were given away.

        Returns how many were. A page that a thread gave away must be zeros for that thread.
        """
        pages = range(offset, offset + length, PAGE)
        until = time.monotonic() + seconds
        given = [0, 0]

        def touch() -> None:
            # A C function that runs without the interpreter's lock.
            room = ctypes.create_string_buffer(length)
            while time.monotonic() < until:
                self._libc.memcpy(room, ctypes.c_void_p(self._address(offset)), length)

        def give(which: int) -> None:
            while time.monotonic() < until:
                for page in pages[which::2]:
                    self.give(page, PAGE)
                    given[which] += 1

        threads = [threading.Thread(target=touch) for _ in range(2)]
        threads += [threading.Thread(target=give, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(given)

    def main(self) -> None:
        print(json.dumps(self.regions), flush=True)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(getattr(self, name)(*arguments)), flush=True)

    def block(self) -> None:
        """Have the descriptor block, for all who hold it."""
        os.set_blocking(self._fd, True)

    def leave(self) -> None:
        sys.exit()


if __name__ == "__main__":
    signal.alarm(600)  # whatever happens to the test
    user, *numbers = map(int, sys.argv[1:])
    if user:
        # Only now: another user may not be able to read this interpreter.
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _Program(numbers[0], numbers[1], numbers[2:]).main()
