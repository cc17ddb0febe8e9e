"""A log handler that nobody waits for: full, failing and stuck descriptors."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmergefs.cli.logqueue import QueuedHandler
from tests.support.live import until

MISSING = "missing here: the log could not be written"


def record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord("x", level, "", 0, "%s", (text,), None)


class Stuck:
    """A pipe that takes nothing until it is read."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        size = fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(self.writer, b"." * size)
        self.full = size

    def lines(self, until_line: str) -> list[str]:
        """All that comes up to this line, without what filled the pipe."""
        said = b""
        while not said.endswith(f"{until_line}\n".encode()):
            said += os.read(self.reader, 65536)
        return said[self.full :].decode().splitlines()


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    pipe = Stuck()
    yield pipe
    os.close(pipe.reader)


def test_nobody_waits_and_order_is_kept(stuck: Stuck) -> None:
    handler = QueuedHandler(stuck.writer)
    texts = [f"{n}é" for n in range(1000)]
    for n, text in enumerate(texts):
        handler.handle(record(logging.WARNING if n % 3 else logging.INFO, text))
    assert stuck.lines("999é") == texts
    handler.close()


def test_a_full_queue_drops_and_counts_and_warnings_last(stuck: Stuck) -> None:
    handler = QueuedHandler(stuck.writer, capacity=100)
    handler.handle(record(logging.INFO, "first"))
    until(lambda: handler._is_writing, "the first is not being written")
    for n in range(10):
        handler.handle(record(logging.INFO, f"routine {n}"))  # 10 bytes each: all fit
    handler.handle(record(logging.INFO, "late"))
    handler.handle(record(logging.WARNING, "w" * 24))  # in place of three
    assert stuck.lines("w" * 24) == [
        "first",
        f"4 records {MISSING}",
        *(f"routine {n}" for n in range(7)),
        "w" * 24,
    ]
    for n in range(20):
        handler.handle(record(logging.WARNING, f"{n:024}"))
    handler.close()


def test_warnings_beyond_the_bound_are_counted_too(stuck: Stuck) -> None:
    handler = QueuedHandler(stuck.writer, capacity=100)
    handler.handle(record(logging.INFO, "first"))
    until(lambda: handler._is_writing, "the first is not being written")
    for n in range(11):
        handler.handle(record(logging.WARNING, f"warning {n:1x}"))
    kept = [f"warning {n}" for n in range(10)]
    assert stuck.lines("warning 9") == ["first", f"1 record {MISSING}", *kept]
    handler.close()


def test_what_cannot_be_written_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    full = [True]

    def failing(fd: int, line: bytes) -> int:
        if full[0]:
            raise OSError(errno.ENOSPC, "full")
        return write(fd, line)

    monkeypatch.setattr(os, "write", failing)
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    handler = QueuedHandler(fd)
    for n in range(3):
        handler.handle(record(logging.INFO, f"{n}"))
        handler.flush()
    full[0] = False
    handler.handle(record(logging.INFO, "again"))
    handler.close()
    os.close(fd)
    assert (tmp_path / "log").read_text() == f"3 records {MISSING}\nagain\n"


def test_a_descriptor_that_does_not_block_is_waited_for(stuck: Stuck) -> None:
    os.set_blocking(stuck.writer, False)
    handler = QueuedHandler(stuck.writer)
    handler.handle(record(logging.INFO, "line"))
    assert stuck.lines("line") == ["line"]
    handler.close()


def test_close_writes_what_waits_for_a_moment_only(stuck: Stuck) -> None:
    handler = QueuedHandler(stuck.writer)
    handler.handle(record(logging.INFO, "line"))
    closing = threading.Thread(target=handler.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
    handler.handle(record(logging.INFO, "later"))
    assert not handler._has_records()
    logging.Handler.flush(handler)


def test_a_fork_has_a_thread_of_its_own(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    handler = QueuedHandler(fd)
    handler.handle(record(logging.INFO, "parent"))
    handler.flush()
    child = os.fork()
    if child == 0:
        handler.handle(record(logging.INFO, "child"))
        handler.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    handler.handle(record(logging.INFO, "parent again"))
    handler.close()
    os.close(fd)
    assert (tmp_path / "log").read_text() == "parent\nchild\nparent again\n"


def log_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "log"]


def test_a_log_that_rests_has_no_thread_until_the_next_record(tmp_path: Path) -> None:
    others = set(log_threads())  # which may end meanwhile
    path = tmp_path / "log"
    handler = QueuedHandler(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    handler.rest()
    for text in ("first", "second"):
        handler.handle(record(logging.INFO, text))
        assert len(set(log_threads()) - others) == 1
        handler.rest()
        assert not set(log_threads()) - others
    assert path.read_text() == "first\nsecond\n"
    handler.close()
    os.close(handler.fd)


def test_a_log_that_cannot_be_written_does_not_rest_and_loses_nothing(stuck: Stuck) -> None:
    handler = QueuedHandler(stuck.writer)
    handler.handle(record(logging.INFO, "first"))
    handler.rest()
    handler.handle(record(logging.INFO, "second"))
    assert stuck.lines("second") == ["first", "second"]
    handler.close()


def test_no_thread_to_be_had_now_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    handler = QueuedHandler(fd)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        handler.handle(record(logging.INFO, "one"))
        handler.flush()
    handler.handle(record(logging.INFO, "two"))
    handler.close()
    os.close(fd)
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
