"""The servers of a mount: the processes that its keeper starts one after another, and their end."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import skips
from tests.support.live import until
from tests.support.mounts import Mount
from tests.support.processes import children_of

#: What the log says of each server but the first.
TOOK_OVER = "took over: "


@pytest.fixture
def covered() -> None:
    """Skips the test on a kernel that covers no mount whose server dies."""
    skips.require_resend()


def kill_server(mount: Mount, number: int = signal.SIGKILL) -> int:
    """Kill the server of a mount, and leave its keeper alone; the server's process id."""
    server = mount.pid
    os.kill(server, number)
    return server


def takeovers(mount: Mount) -> int:
    """How many servers have taken over and serve, by the log."""
    return mount.log().count(TOOK_OVER)


def deaths(mount: Mount) -> int:
    """How many servers have died before the one that took over last, by the log."""
    return int(re.findall(rf"server (\d+) {TOOK_OVER}", mount.log())[-1]) - 1


def wait_for_takeovers(mount: Mount, number: int) -> None:
    """Wait until so many servers have taken over."""
    until(lambda: takeovers(mount) >= number, f"{number} takeovers")


def kill_and_wait(mount: Mount) -> None:
    """Kill the server, and wait until the next one says that it serves."""
    before = takeovers(mount)
    kill_server(mount)
    wait_for_takeovers(mount, before + 1)


def kill_at(mount: Mount, moments: Iterable[float]) -> int:
    """Kill the server after each of these times; how many kills there were.

    Each is counted from when there is a server again, whatever that does then.
    """
    killed = [0]

    def following() -> list[int]:
        return [pid for pid in children_of(mount.process.pid) if pid != killed[-1]]

    for seconds in moments:
        server = until(following, "there is no next server")[-1]
        time.sleep(seconds)
        os.kill(server, signal.SIGKILL)
        killed.append(server)
    return len(killed) - 1


def descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def memory_kib(pid: int) -> int:
    """The memory that a process has for itself, and what it shares with others by its share."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    found = re.search(r"^Pss:\s+(\d+) kB$", text, re.MULTILINE)
    assert found
    return int(found[1])


def memory_files_kib(pid: int) -> int:
    """The size of the memory files (memfd_create) that a process holds."""
    total = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        if os.readlink(path).startswith("/memfd:"):
            total += os.stat(path).st_blocks // 2
    return total


@contextmanager
def killing(mount: Mount, seconds: float) -> Iterator[list[int]]:
    """Kill the server again and again meanwhile, on average so long after its start.

    Gives the list of those that were killed, which grows.
    """
    killed: list[int] = []
    end = threading.Event()

    def work() -> None:
        while not end.wait(random.random() * 2 * seconds):
            servers = children_of(mount.process.pid)
            if servers and servers[-1] not in killed:
                os.kill(servers[-1], signal.SIGKILL)
                killed.append(servers[-1])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        end.set()
        thread.join()
