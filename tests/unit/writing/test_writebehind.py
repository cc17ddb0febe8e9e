"""Write-behind: the right bytes at the right places, errors that are told, and no thread left."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.errors import FileAccessError, NoSpaceError
from diffmergefs.core.failures import Target
from diffmergefs.writing import writebehind
from diffmergefs.writing.writebehind import BUFFER, WriteBehind

WINDOW = writebehind._WINDOW


@pytest.fixture(params=[True, False], ids=["memory", "disk"])
def in_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the target is taken for one in memory, which is written by the thread."""
    magic = sparse.TMPFS_MAGIC if request.param else 0xEF53
    monkeypatch.setattr(sparse, "filesystem_magic", lambda fd: magic)
    return bool(request.param)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    path = tmp_path / "out"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield Target(fd, str(path))
    finally:
        os.close(fd)
        assert not [t for t in threading.enumerate() if t.name.startswith("write-behind")]


def filled(behind: WriteBehind, byte: int) -> memoryview:
    buffer = behind.buffer()
    assert len(buffer) == BUFFER
    buffer[:] = bytes([byte]) * BUFFER
    return buffer


@pytest.mark.usefixtures("in_memory")
def test_every_byte_where_it_belongs(target: Target) -> None:
    """Also of parts of buffers, with gaps, and of more buffers than there are at a time."""
    parts = [(7, BUFFER), (BUFFER + 100, 1), (2 * BUFFER, 700_000)]
    parts += [(n * BUFFER + 3, BUFFER - 3) for n in range(3, 12)]
    expected = bytearray(12 * BUFFER)
    with WriteBehind(target) as behind:
        for byte, (offset, length) in enumerate(parts, 1):
            behind.write(filled(behind, byte), length, offset)
            expected[offset : offset + length] = bytes([byte]) * length
    assert Path(target.path).read_bytes() == expected


@pytest.mark.usefixtures("in_memory")
def test_buffers_are_used_again(target: Target) -> None:
    addresses = set()
    with WriteBehind(target) as behind:
        for number in range(20):
            buffer = filled(behind, number)
            addresses.add(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))
            behind.write(buffer, BUFFER, number * BUFFER)
    assert len(addresses) <= writebehind._BUFFERS


def test_in_memory_the_caller_goes_on(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "filesystem_magic", lambda fd: sparse.TMPFS_MAGIC)
    gate, pwrite = threading.Event(), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *a: (gate.wait(), pwrite(*a))[1])
    with WriteBehind(target) as behind:
        behind.write(filled(behind, 1), BUFFER, 0)
        buffer = filled(behind, 2)  # another one: the first is being written
        gate.set()
        behind.write(buffer, BUFFER, BUFFER)
    assert Path(target.path).read_bytes() == bytes([1]) * BUFFER + bytes([2]) * BUFFER


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EIO, FileAccessError), (errno.ENOSPC, NoSpaceError)]
)
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.usefixtures("in_memory")
def test_a_failed_write_is_told(
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    expected: type[Exception],
    nth: int,
) -> None:
    """Of the last buffer too, which nothing but leaving can tell."""
    calls: list[int] = []
    pwrite = os.pwrite

    def failing(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) == nth:
            raise OSError(number, os.strerror(number))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with (
        pytest.raises(expected, match=f"^{target.path}: {os.strerror(number)}"),
        WriteBehind(target) as behind,
    ):
        for turn in range(3):
            behind.write(filled(behind, 1), BUFFER, turn * BUFFER)


def test_on_an_exception_what_was_not_begun_is_given_up(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "filesystem_magic", lambda fd: sparse.TMPFS_MAGIC)
    begun, gate, pwrite = threading.Event(), threading.Event(), os.pwrite

    def waiting(*args: Any) -> int:
        begun.set()
        gate.wait()
        return pwrite(*args)

    shutdown = ThreadPoolExecutor.shutdown

    def opening(self: ThreadPoolExecutor, **options: Any) -> None:
        # What is to be given up is given up before the write under way may go on.
        shutdown(self, wait=False, **options)
        gate.set()
        shutdown(self)

    monkeypatch.setattr(os, "pwrite", waiting)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", opening)
    with pytest.raises(KeyboardInterrupt), WriteBehind(target) as behind:
        behind.write(filled(behind, 1), BUFFER, 0)
        behind.write(filled(behind, 2), BUFFER, BUFFER)
        begun.wait()
        raise KeyboardInterrupt
    # The one that was under way is whole, the other never came.
    assert Path(target.path).read_bytes() == bytes([1]) * BUFFER


class Calls:
    """A libc whose sync_file_range is noted, and carried out."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int, int]] = []
        self.threads: set[str] = set()

    def sync_file_range(
        self, fd: int, offset: ctypes.c_int64, count: ctypes.c_int64, flags: int
    ) -> None:
        self.ranges.append((offset.value, count.value, flags))
        self.threads.add(threading.current_thread().name)
        assert ctypes.CDLL(None).sync_file_range(fd, offset, count, flags) == 0


def test_what_lies_behind_goes_to_the_disk(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """In windows, by another thread, without waiting; each byte once and gaps with it."""
    calls = Calls()
    monkeypatch.setattr(writebehind, "_libc", calls)
    monkeypatch.setattr(sparse, "filesystem_magic", lambda fd: 0xEF53)
    count = 2 * WINDOW // BUFFER
    with WriteBehind(target) as behind:
        for number in range(count):
            behind.write(filled(behind, 1), BUFFER, number * BUFFER)
        behind.written(5 * WINDOW)  # copied in the kernel
        behind.written(5 * WINDOW + 1)
    write = 2  # SYNC_FILE_RANGE_WRITE, and neither of the flags that wait
    assert calls.ranges == [
        (0, WINDOW, write),
        (WINDOW, WINDOW, write),
        (2 * WINDOW, 3 * WINDOW, write),
    ]
    assert threading.current_thread().name not in calls.threads


@pytest.mark.usefixtures("in_memory")
def test_nothing_is_synced(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("fsync"))
    monkeypatch.setattr(os, "fdatasync", lambda fd: pytest.fail("fdatasync"))
    with WriteBehind(target) as behind:
        behind.write(filled(behind, 1), 10, 0)
    assert Path(target.path).stat().st_size == 10


@pytest.mark.usefixtures("in_memory")
def test_without_a_thread_all_is_written_by_the_caller(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    count = 2 * WINDOW // BUFFER
    with WriteBehind(target) as behind:
        for byte in range(count):
            behind.write(filled(behind, byte), BUFFER, byte * BUFFER)
    expected = b"".join(bytes([byte]) * BUFFER for byte in range(count))
    assert Path(target.path).read_bytes() == expected
