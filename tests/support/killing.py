"""Kills clients of a mount, and watches whether its daemon goes on: a program.

``python -m tests.support.killing VIEW PID KILLS`` maps the file VIEW, which process PID serves, and
KILLS times has a child touch one page of it after another, until SIGKILL hits it while it waits for
one. Its only request is taken back then. Two processes that do nothing but count run beside it.
Prints JSON: `held_ms` has, for each time that PID then lay in read(2), for how long (a second at
most, then the next child's request wakes it).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

PAGE = 4096
_SPIN_SECONDS = 0.001
_MOST_SECONDS = 1.0
_READ = "0"  # the number of read(2), x86-64's
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def mapped(path: str) -> tuple[int, int]:
    """The address and length of a private mapping of the whole file, without readahead.

    No descriptor of it stays open, as one does with mmap.mmap: the kernel would tell the daemon of
    its close when the child dies, which wakes it.
    """
    fd = os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, 0)
    os.close(fd)
    assert address not in (None, ctypes.c_void_p(-1).value)
    assert _libc.madvise(address, size, mmap.MADV_RANDOM) == 0
    return address, size


def touch(address: int, pages: range, touched: mmap.mmap) -> NoReturn:
    """Touch page after page; the first byte of `touched` changes before each."""
    for page in pages:
        touched[0] = touched[0] % 255 + 1
        ctypes.string_at(address + page * PAGE, 1)
    os._exit(0)


def kill_one_that_waits(pid: int, touched: mmap.mmap) -> None:
    """Kill the child when it has waited for a page for a moment, of some length."""
    until = random.random() * _SPIN_SECONDS
    seen, since = 0, 0.0
    while seen == 0 or time.perf_counter() - since < until:
        if touched[0] != seen:
            seen, since = touched[0], time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def held(daemon: int) -> float:
    """For how many seconds the daemon sleeps in read(2) now; 0 if it does not."""
    since = time.perf_counter()
    reads = False
    while (now := time.perf_counter()) - since < _MOST_SECONDS:
        call = Path(f"/proc/{daemon}/syscall").read_text(encoding="ascii").split()[0]
        if call not in ("running", _READ):
            break
        reads = reads or call == _READ
        time.sleep(0.001)
    return now - since if reads else 0.0


@contextmanager
def busy() -> Iterator[None]:
    """A process that leaves no processor idle."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def main(view: str, daemon: int, kills: int) -> None:
    address, size = mapped(view)
    touched = mmap.mmap(-1, PAGE)
    each = size // PAGE // kills
    found = []
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(busy())
        for n in range(kills):
            touched[0] = 0
            if (child := os.fork()) == 0:
                touch(address, range(n * each, (n + 1) * each), touched)
            kill_one_that_waits(child, touched)
            found.append(held(daemon))
    print(json.dumps({"held_ms": [round(seconds * 1000) for seconds in found if seconds]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
