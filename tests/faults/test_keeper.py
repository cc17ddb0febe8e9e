"""A server is replaced when it hangs, ends as signals say, and lives on when its keeper dies"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import mounttable
from tests.support.bigstore import write_store
from tests.support.images import PAGE, overlay_oracle
from tests.support.live import held, until
from tests.support.mounts import mounted
from tests.support.processes import children_of, is_dead
from tests.support.readers import reading
from tests.support.servers import TOOK_OVER, covered, kill_server, takeovers, wait_for_takeovers
from tests.support.stores import BASE_PAGES, SIZE, pages, write_chain

__all__ = ["covered"]

pytestmark = pytest.mark.usefixtures("covered")

READERS = 16
_SECONDS = 60
UNCOVERED = "the keeper is gone"
EXPECTED = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1])])


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


@pytest.fixture
def view(mountpoint: Path) -> Path:
    return mountpoint / "leaf" / "memory.bin"


def test_a_stopped_server_is_replaced(
    public_path: Path, mountpoint: Path, count: Callable[[int], int], seen: Callable[..., None]
) -> None:
    """SIGSTOP of the server under load: no client fails"""
    store, oracles = write_store(public_path)
    pairs = [(mountpoint / name, oracle) for name, oracle in oracles]
    times = count(30)
    log = (TOOK_OVER, "Traceback", "Fatal Python error")
    with mounted(store, mountpoint, "--watchdog=1", expect_log=log) as mount:
        with reading(READERS, pairs) as load:
            for number in range(times):
                kill_server(mount, signal.SIGSTOP)
                wait_for_takeovers(mount, number + 1)
            assert load.end()[2] == Counter(well=READERS)
        assert takeovers(mount) == times
    seen(stopped=times, longest_stall_ms=load.longest_ms)


def test_the_keeper_has_one_thread_and_none_of_its_files(
    store: Path, view: Path, mountpoint: Path
) -> None:
    """So that a fork of it is a whole process, and that it never waits for its own server"""
    with mounted(store, mountpoint, expect_log=(TOOK_OVER,)) as mount:
        keeper = Path(f"/proc/{mount.process.pid}")
        with view.open("rb", buffering=0) as file:
            for number in range(3):
                assert file.read(PAGE)
                assert len(os.listdir(keeper / "task")) == 1
                names = [os.readlink(each) for each in (keeper / "fd").iterdir()]
                assert not any(name.startswith(str(mountpoint)) for name in names)
                kill_server(mount)
                wait_for_takeovers(mount, number + 1)


def test_a_server_lives_on_without_its_keeper(store: Path, view: Path, mountpoint: Path) -> None:
    """It says so, serves, and SIGTERM to it detaches and ends it at the last close"""
    with mounted(store, mountpoint, expect_log=(UNCOVERED,)) as mount:
        server = mount.pid
        try:
            with held(view) as holder:
                mount.process.kill()
                mount.process.wait(_SECONDS)
                until(lambda: UNCOVERED in mount.log(), "it is not said")
                assert view.read_bytes() == EXPECTED
                os.kill(server, signal.SIGTERM)
                until(lambda: not mounttable.at(str(mountpoint)), "it is not detached")
                assert holder.read(0, SIZE) == EXPECTED
                assert not is_dead(server)
            until(lambda: is_dead(server), "it did not end")
        finally:
            if not is_dead(server):
                os.kill(server, signal.SIGKILL)


def test_two_signals_to_the_keeper_end_the_mount_at_once(
    store: Path, view: Path, mountpoint: Path
) -> None:
    with mounted(store, mountpoint) as mount, held(view) as holder:
        server = mount.pid
        mount.process.terminate()
        until(lambda: "SIGTERM: detached" in mount.log(), "it is not detached")
        mount.process.terminate()
        assert mount.process.wait(_SECONDS) == 0
        assert is_dead(server)
        assert holder.read(0, PAGE) == b""  # SIGBUS


def test_an_interrupt_of_the_whole_group_counts_once(
    store: Path, view: Path, mountpoint: Path, public_path: Path
) -> None:
    """Ctrl-C reaches keeper and server: the mount is detached, and served on"""
    command = [sys.executable, "-m", "diffmergefs", "mount", "-f", f"--state-dir={public_path}"]
    log = public_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, str(store), str(mountpoint)], stderr=file, start_new_session=True
        )
    try:
        until(lambda: ": ready" in log.read_text(), "it is not ready")
        with held(view) as holder:
            os.killpg(process.pid, signal.SIGINT)
            until(lambda: "SIGINT: detached" in log.read_text(), "it is not detached")
            time.sleep(1)  # a second one would end it now
            assert process.poll() is None
            assert holder.read(0, SIZE) == EXPECTED
        assert process.wait(_SECONDS) == 0
        assert "again" not in log.read_text()
    finally:
        process.kill()
        process.wait(_SECONDS)
        mounttable.unmount_below(str(mountpoint))


@pytest.mark.parametrize("how", ["SIGTERM", "umount"])
def test_a_detached_mount_is_served_on_over_kills(
    how: str, store: Path, view: Path, mountpoint: Path
) -> None:
    """Until the last file is closed; then the keeper ends too"""
    with mounted(store, mountpoint, expect_log=(TOOK_OVER,)) as mount:
        with held(view) as holder, held(mountpoint / "base" / "memory.bin") as other:
            if how == "SIGTERM":
                mount.process.terminate()
                until(lambda: "SIGTERM: detached" in mount.log(), "it is not detached")
            else:
                subprocess.run(["umount", "-l", mountpoint], check=True, timeout=_SECONDS)
            assert not mounttable.at(str(mountpoint))
            for number in range(SIZE // PAGE - 1):
                kill_server(mount)
                wait_for_takeovers(mount, number + 1)
                start = number * PAGE
                assert holder.read(start, PAGE) == EXPECTED[start : start + PAGE]
            other.end()
            assert holder.read(0, SIZE) == EXPECTED
            assert mount.process.poll() is None
        assert mount.process.wait(_SECONDS) == 0
        assert not children_of(mount.process.pid)


def test_the_end_comes_while_servers_are_killed(
    store: Path, mountpoint: Path, count: Callable[[int], int]
) -> None:
    """A SIGTERM between two kills is neither lost nor counted twice"""
    for number in range(count(50)):
        with mounted(store, mountpoint, expect_log=(TOOK_OVER,)) as mount:
            kill_server(mount)
            time.sleep(number % 5 / 100)
            mount.process.terminate()
            assert mount.process.wait(_SECONDS) == 0
            assert not mounttable.at(str(mountpoint))
