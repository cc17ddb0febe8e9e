"""A log handler that does not block: a thread writes the records."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections import deque

from diffmergefs.core.errors import counted

_BYTES = 4 << 20
_LAST_SECONDS = 1.0
_USUAL_SECONDS = 0.05


class QueuedHandler(logging.Handler):
    """Writes records to the descriptor `fd`, even if writing blocks or fails.

    A record is written when `emit` returns, unless writing takes more than 50 ms. Then the thread
    writes it, and all later ones until the log has caught up. At most `capacity` bytes wait in the
    queue. When it is full, records below a warning are dropped, the newest first, and then new
    warnings. The number of dropped records is logged as soon as possible. The thread starts with
    the first record, or the first after `rest`: a fork before that is harmless, and a child that is
    forked later gets its own thread and queue. `flush` waits for at most a second, and so does
    `close`, which then drops the rest. The descriptor stays open.
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
        # Numbered to keep the order. Records below a warning are dropped first.
        self._routine: deque[tuple[int, bytes]] = deque()
        self._warnings: deque[tuple[int, bytes]] = deque()
        self._count = self._waiting = self._dropped = 0
        self._is_writing = self._is_closed = self._is_late = self._is_resting = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write or queue a record."""
        try:
            line = self._line(record)
        except Exception:
            self.handleError(record)
            return
        self._accept(line, is_warning=record.levelno >= logging.WARNING)

    def write_line(self, line: str) -> None:
        """Write or queue a line that is not a record, with the priority of a warning."""
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
        with contextlib.suppress(RuntimeError):  # the next record tries again
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
        # The next line to write, and how many records it stands for: the oldest record, after a
        # line about dropped ones.
        filled = [queue for queue in (self._routine, self._warnings) if queue]
        _, line = min(filled, key=lambda queue: queue[0]).popleft()
        self._waiting -= len(line)
        dropped, self._dropped = self._dropped, 0
        if dropped:
            text = f"{counted(dropped, 'record')} missing here: the log could not be written"
            notice = logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (), None)
            line = self._line(notice) + line
        return line, dropped + 1

    def _write_all(self) -> None:
        failed = 0
        while True:
            with self._changed:
                self._dropped += failed
                self._is_writing = False
                self._is_late = self._is_late and self._has_records()
                self._changed.notify_all()
                self._changed.wait_for(self._has_news)
                if not self._has_records():
                    return
                line, count = self._take()
                self._is_writing = True
            failed = 0 if _written(self.fd, line) else count

    def _has_news(self) -> bool:
        return self._is_closed or self._is_resting or self._has_records()

    def _has_records(self) -> bool:
        return bool(self._routine or self._warnings)

    def flush(self) -> None:
        """Return when everything is written, after at most a second."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._changed.wait_for(self._is_idle, _LAST_SECONDS if self._thread else 0)

    def rest(self) -> None:
        """End the thread until the next record, so that a fork copies a process with one thread.

        Waits for at most two seconds; then a log that cannot be written keeps its thread.
        """
        self.flush()
        with self._changed:
            thread, self._is_resting = self._thread, True
            self._changed.notify_all()
        if thread is not None:
            thread.join(_LAST_SECONDS)
        with self._changed:
            self._is_resting = False
            if thread is not None and not thread.is_alive():
                self._thread = None

    def _is_idle(self) -> bool:
        return not (self._has_records() or self._is_writing)

    def close(self) -> None:
        """Write the queue for at most a second. Later records are dropped."""
        if os.getpid() != self._process:
            self._begin()  # a thread that this process does not have may hold the lock
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
                # Another process that shares the descriptor may have made it nonblocking.
                poll = select.poll()
                poll.register(fd, select.POLLOUT)
                poll.poll()
    except OSError:
        return False
    return True
