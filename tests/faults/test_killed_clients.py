"""Clients die by SIGKILL while they wait for a page: the mount goes on for the others"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.live import patch_children
from tests.support.mounts import Mount, mounted

SIZE = 64 << 30
# What a read of the device may be held up by. With a pyfuse3 whose reads cannot be told, there is
# an alarm only every 0.2 s.
HELD_MS, HELD_MS_OTHERWISE = 200, 400

# The processor is taken away from the daemon just between readiness and read(2), each time.
PREEMPTED = """
import time
from diffmergefs.fuse import readloop
call = readloop.RequestWait.__call__
def late(self, fd):
    async def wait():
        await call(self, fd)
        time.sleep(0.003)
    return wait()
readloop.RequestWait.__call__ = late
"""
# And this pyfuse3 does not use trio as it is known.
NOT_AS_KNOWN = """
import time, pyfuse3, trio
class Other:
    def __init__(self, module): self.module = module
    def __getattr__(self, name): return getattr(self.module, name)
async def wait_readable(fd):
    await trio.lowlevel.wait_readable(fd)
    time.sleep(0.003)
pyfuse3.trio = Other(trio)
pyfuse3.trio.lowlevel = Other(trio.lowlevel)
pyfuse3.trio.lowlevel.wait_readable = wait_readable
"""
CASES = {
    "as it comes": ("", 1000, HELD_MS),
    "preempted before each read": (PREEMPTED, 300, HELD_MS),
    "the same without a read loop of our own": (NOT_AS_KNOWN, 300, HELD_MS_OTHERWISE),
}


@pytest.fixture
def base(public_path: Path) -> Path:
    path = public_path / "base.mem"
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.seek(SIZE // 2)
        file.write(b"data")
    return path


@pytest.mark.parametrize("case", CASES)
def test_a_killed_client_freezes_nobody(
    case: str,
    base: Path,
    public_path: Path,
    mountpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: Callable[[int], int],
    seen: Callable[..., None],
) -> None:
    """The only request is taken back when it may be read already, two busy processes beside it"""
    code, full, limit = CASES[case]
    kills = count(full)
    with monkeypatch.context() as patch:
        if code:
            patch_children(patch, public_path / "site", code)
        expected = ("fast read loop is not in force",) if code == NOT_AS_KNOWN else ()
        with mounted(None, mountpoint, "--base", str(base), expect_log=expected) as mount:
            patch.undo()
            held = kill_clients(mount, mountpoint / base.name, kills)
    seen(kills=kills, held_up=len(held), longest_ms=max(held, default=0))
    assert not [ms for ms in held if ms > limit]


def kill_clients(mount: Mount, view: Path, kills: int) -> list[int]:
    command = [sys.executable, "-m", "tests.support.killing", str(view), str(mount.pid), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    held: list[int] = json.loads(done.stdout)["held_ms"]
    return held


def test_an_idle_mount_is_not_woken(
    base: Path, mountpoint: Path, seen: Callable[..., None]
) -> None:
    """Five times a second at most"""
    seconds = 4
    with mounted(None, mountpoint, "--base", str(base)) as mount:
        assert (mountpoint / base.name).stat().st_size == SIZE
        time.sleep(1)
        before = switches(mount.pid)
        time.sleep(seconds)
        woken = switches(mount.pid) - before
    seen(seconds=seconds, woken=woken)
    assert woken <= 5 * seconds


def switches(pid: int) -> int:
    """How often the main thread of the process has gone to sleep."""
    lines = Path(f"/proc/{pid}/task/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt"))
