"""The loop that reads requests, in a real mount."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3

from tests.support import mounttable, skips

SERVER = """
import sys, pyfuse3, trio
from diffmergefs.fuse import readloop
from tests.bench import constant

class Steps(trio.abc.Instrument):
    count = 0
    def before_task_step(self, task):
        self.count += task.name.startswith("pyfuse-")

class Counted(constant._Constant):
    reads = 0
    async def read(self, fh, off, size):
        self.reads += 1
        return await super().read(fh, off, size)

steps, served = Steps(), Counted(1 << 30)
with readloop.read_loop() as loop:
    pyfuse3.init(served, sys.argv[1], {"fsname=constant", "ro"})
    print("up", flush=True)
    async def main():
        with loop.alarm:
            await pyfuse3.main()
    trio.run(main, instruments=[steps])
print(int(loop.is_fast), served.reads, steps.count)
pyfuse3.close()
"""


# Every tenth wait ends although no request is there, as if the kernel had taken it back.
TAKEN_BACK = """
from diffmergefs.fuse import readloop
call, count = readloop.RequestWait.__call__, 0
def wait(self, fd):
    global count
    count += 1
    if count % 10:
        return call(self, fd)
    self._alarm.expect()
    return readloop._AT_ONCE
readloop.RequestWait.__call__ = wait
"""


@contextmanager
def served(mountpoint: Path, code: str) -> Iterator[Callable[[], list[int]]]:
    """A server with the read loop; what it printed at its end, once it is unmounted."""
    skips.require_fuse()
    command = [sys.executable, "-c", code, str(mountpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None

        def end() -> list[int]:
            mounttable.unmount(str(mountpoint))
            assert server.stdout is not None
            return [int(number) for number in server.stdout.read().split()]

        try:
            assert server.stdout.readline() == "up\n"
            yield end
        finally:
            server.kill()
            if mounttable.at(str(mountpoint)):
                mounttable.unmount(str(mountpoint))


def read_pages(mountpoint: Path, count: int) -> None:
    with (mountpoint / "image").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for n in range(count):
            assert os.pread(file.fileno(), 4096, n << 20) == bytes(4096)


def test_the_fast_loop_is_in_force_and_a_request_takes_one_step_of_a_task_at_most(
    mountpoint: Path,
) -> None:
    # And a mount that is unmounted ends, though a task waits for the lock.
    with served(mountpoint, SERVER) as end:
        read_pages(mountpoint, 1000)
        is_fast, reads, steps = end()
    assert is_fast, f"pyfuse3 {pyfuse3.__version__} breaks fact 1 or 2 of fuse/readloop.py"
    assert reads >= 1000
    assert steps < reads + 50  # those of the start, of opening, and of the end


def test_a_read_that_a_signal_ends_is_no_error_to_pyfuse3(mountpoint: Path) -> None:
    with served(mountpoint, TAKEN_BACK + SERVER) as end:
        read_pages(mountpoint, 100)
        is_fast, reads, _ = end()
    assert is_fast and reads >= 100, f"pyfuse3 {pyfuse3.__version__} breaks fact 3"
