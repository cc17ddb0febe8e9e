"""A log that nobody waits for: records are written by a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections import deque

_BYTES = 4 << 20
_LAST_SECONDS = 1.0
_USUAL_SECONDS = 0.05


class QueuedHandler(logging.Handler):
    """Writes records to the descriptor `fd`, which may block, or fail, as long as it likes.

    A record is written when the call returns, as long as that takes no more than 50 ms; one that
    takes longer, and all after it until the log has caught up, are left to the thread.
    At most `capacity` bytes of them wait. When it is full, records below a warning are dropped
    first, the newest first, then new warnings; how many is written as soon as something can be. The
    thread starts with the first record: a fork before that is harmless, and one after it has a
    thread and a queue of its own. `flush` waits for a second at most, and so does `close`, which
    then drops what is left. The descriptor stays open.
    """

    def __init__(self, fd: int, encoding: str = "utf-8", capacity: int = _BYTES) -> None:
        super().__init__()
        self.fd = fd
        self._encoding = encoding
        self._capacity = capacity
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        # By their number, so that the order is kept: those that are dropped first, and warnings.
        self._routine: deque[tuple[int, bytes]] = deque()
        self._warnings: deque[tuple[int, bytes]] = deque()
        self._count = self._waiting = self._dropped = 0
        self._is_writing = self._is_closed = self._is_late = False

    def emit(self, record: logging.LogRecord) -> None:
        """Have it written."""
        try:
            line = self._line(record)
        except Exception:
            self.handleError(record)
            return
        self._accept(line, is_warning=record.levelno >= logging.WARNING)

    def write_line(self, line: str) -> None:
        """Have a line written that is no record, as a warning is."""
        self._accept(self._encoded(line), is_warning=True)

    def _accept(self, line: bytes, *, is_warning: bool) -> None:
        if os.getpid() != self._process:
            self._begin()
        with self._changed:
            self._put(line, is_warning=is_warning)
            self._changed.notify_all()
            if self._thread is None and not self._is_closed:
                self._start()
            if self._thread is not None and not self._is_late:
                self._is_late = not self._changed.wait_for(self._is_idle, _USUAL_SECONDS)

    def _line(self, record: logging.LogRecord) -> bytes:
        return self._encoded(self.format(record))

    def _encoded(self, text: str) -> bytes:
        return f"{text}\n".encode(self._encoding, "backslashreplace")

    def _start(self) -> None:
        thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        with contextlib.suppress(RuntimeError):  # none can be had now: the next record asks again
            thread.start()
            self._thread = thread

    def _put(self, line: bytes, *, is_warning: bool) -> None:
        while is_warning and self._routine and self._waiting + len(line) > self._capacity:
            self._waiting -= len(self._routine.pop()[1])
            self._dropped += 1
        if self._is_closed or self._waiting + len(line) > self._capacity:
            self._dropped += 1
            return
        self._count += 1
        self._waiting += len(line)
        (self._warnings if is_warning else self._routine).append((self._count, line))

    def _take(self) -> tuple[bytes, int]:
        # What is to be written next, and how many records it stands for: the oldest that is left,
        # after a word on those that were dropped.
        filled = [queue for queue in (self._routine, self._warnings) if queue]
        _, line = min(filled, key=lambda queue: queue[0]).popleft()
        self._waiting -= len(line)
        dropped, self._dropped = self._dropped, 0
        if dropped:
            text = f"{dropped} records are missing here: the log could not be written"
            word = logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (), None)
            line = self._line(word) + line
        return line, dropped + 1

    def _write_all(self) -> None:
        failed = 0
        while True:
            with self._changed:
                self._dropped += failed
                self._is_writing = False
                self._is_late = self._is_late and self._has_records()
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_closed or self._has_records())
                if not self._has_records():
                    return
                line, count = self._take()
                self._is_writing = True
            failed = 0 if _written(self.fd, line) else count

    def _has_records(self) -> bool:
        return bool(self._routine or self._warnings)

    def flush(self) -> None:
        """Return when all is written, after a second at the latest."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._changed.wait_for(self._is_idle, _LAST_SECONDS if self._thread else 0)

    def _is_idle(self) -> bool:
        return not (self._has_records() or self._is_writing)

    def close(self) -> None:
        """Write what waits, for a second at most; what comes later is dropped."""
        self.flush()
        with self._changed:
            self._is_closed = True
            self._routine.clear()
            self._warnings.clear()
            self._changed.notify_all()
        super().close()


def _written(fd: int, line: bytes) -> bool:
    try:
        while line:
            try:
                line = line[os.write(fd, line) :]
            except BlockingIOError:
                # Whoever shares it with us may have made it so.
                poll = select.poll()
                poll.register(fd, select.POLLOUT)
                poll.poll()
    except OSError:
        return False
    return True
