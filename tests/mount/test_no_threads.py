"""A mount for which no new thread can be started (pids.max) serves on, and ends in good order."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support import mounttable
from tests.support.images import PAGE, signed
from tests.support.live import patch_children, until
from tests.support.mounts import Mount, mounted
from tests.support.stores import write_chain

# Threads of trio that have nothing to do end at once, so that each new piece of work takes one.
NO_MORE = """
import os, threading
import trio._core._thread_cache
trio._core._thread_cache.IDLE_TIMEOUT = 0.01
real = threading.Thread.start
def start(self):
    if os.path.exists({marker!r}):
        raise RuntimeError("can't start new thread")
    real(self)
threading.Thread.start = start
"""
# The main thread, and those that wait all the time: the reserve, who closes, and the log.
AT_REST = 7


@pytest.mark.parametrize("options", [[], ["--drop-behind"], ["--prefetch=fadvise"]], ids=str)
def test_it_opens_reads_and_ends_as_ever(
    options: list[str], public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, marker = write_chain(public_path / "store", ["base", "leaf"]), public_path / "no-more"
    patch_children(monkeypatch, public_path / "site", NO_MORE.format(marker=str(marker)))
    with mounted(store, mountpoint, *options) as mount:
        marker.touch()
        until(lambda: threads(mount) <= AT_REST, "trio's threads do not end")
        folder = mountpoint / "leaf"
        assert sorted(os.listdir(folder)) == ["memory.bin", "snapshot.json", "vmstate"]
        assert (folder / "vmstate").read_bytes() == b"state of leaf"
        with (folder / "memory.bin").open("rb", buffering=0) as image:
            assert image.read(2 * PAGE) == signed(0, 0, PAGE) + signed(1, PAGE, PAGE)
            mount.process.send_signal(signal.SIGTERM)
            until(lambda: not mounttable.at(str(mountpoint)), "it was not detached")
            assert mount.process.poll() is None
            image.seek(4 * PAGE)
            assert image.read(PAGE) == signed(0, 4 * PAGE, PAGE)
        assert mount.process.wait(60) == 0
        assert "bug" not in mount.log()


def threads(mount: Mount) -> int:
    return len(os.listdir(f"/proc/{mount.pid}/task"))
