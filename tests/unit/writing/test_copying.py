"""Early writeback: in windows, by another thread, and nothing but a help."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffmergefs.writing import copying
from diffmergefs.writing.copying import early_writeback

WINDOW = 1 << 20


class Calls:
    """A libc whose sync_file_range is noted, and carried out."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int, int]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def sync_file_range(
        self, fd: int, offset: ctypes.c_int64, count: ctypes.c_int64, flags: int
    ) -> None:
        self.ranges.append((offset.value, count.value, flags))
        self.threads.add(threading.current_thread().name)
        self.gate.wait()
        assert ctypes.CDLL(None).sync_file_range(fd, offset, count, flags) == 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(copying, "_libc", calls)
    monkeypatch.setattr(copying, "_WINDOW", WINDOW)
    return calls


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
        assert not [t for t in threading.enumerate() if t.name.startswith("writeback")]


def wait_for_calls(calls: Calls, count: int) -> None:
    while len(calls.ranges) < count:
        threading.Event().wait(0.001)


def test_what_was_written_goes_to_the_disk(fd: int, calls: Calls) -> None:
    """In windows, by another thread, without waiting; each byte once and gaps with it."""
    with early_writeback(fd) as written:
        for stop in range(0, 2 * WINDOW + 1, WINDOW // 4):
            written(stop)
        written(5 * WINDOW)
        written(5 * WINDOW + 1)
        wait_for_calls(calls, 3)
    write = 2  # SYNC_FILE_RANGE_WRITE, and neither of the flags that wait
    assert calls.ranges == [
        (0, WINDOW, write),
        (WINDOW, WINDOW, write),
        (2 * WINDOW, 3 * WINDOW, write),
    ]
    assert threading.current_thread().name not in calls.threads


def test_on_leaving_what_was_not_begun_is_left_to_the_fsync(
    fd: int, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutdown = ThreadPoolExecutor.shutdown

    def opening(self: ThreadPoolExecutor, **options: bool) -> None:
        shutdown(self, wait=False, **options)
        calls.gate.set()
        shutdown(self)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", opening)
    calls.gate.clear()
    with pytest.raises(KeyboardInterrupt), early_writeback(fd) as written:
        written(WINDOW)
        wait_for_calls(calls, 1)
        written(2 * WINDOW)
        raise KeyboardInterrupt
    assert len(calls.ranges) == 1


def test_nothing_is_synced(fd: int, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("fsync"))
    monkeypatch.setattr(os, "fdatasync", lambda fd: pytest.fail("fdatasync"))
    with early_writeback(fd) as written:
        written(WINDOW)


def test_without_a_thread_all_is_left_to_the_fsync(
    fd: int, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with early_writeback(fd) as written:
        written(5 * WINDOW)
    assert calls.ranges == []
