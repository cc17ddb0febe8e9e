"""Write-behind: a new file is written, and goes to the disk, while its next bytes are read."""

from __future__ import annotations

import ctypes
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from diffmergefs.core import sparse
from diffmergefs.core.buffers import page_aligned
from diffmergefs.core.failures import Target, failures
from diffmergefs.writing.copying import write_at

#: The bytes of a buffer: the more, the less often the threads wait for the interpreter.
BUFFER = 2 << 20
_BUFFERS = 3
# So much is written before the kernel is told to begin with it.
_WINDOW = 32 << 20
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None)


class WriteBehind:
    """A context manager that writes buffers to `target`, with a second thread's help.

    On a disk that thread has the kernel begin to write out what lies behind: otherwise that begins
    late, often with the fsync at the end, and until then the disk has waited. In memory (tmpfs),
    where a page costs most, the thread writes and the caller goes on.

    Nothing is durable on leaving, and an error of the disk may not have been seen: the fsync that
    must follow sees to both (sync_file_range(2) with SYNC_FILE_RANGE_WRITE alone does not take the
    file's errors). A write that failed raises NoSpaceError or FileAccessError, if not at once then
    in a later call or on leaving. Leaving waits for all writes; on an exception those not begun are
    given up. No thread is left after it. Where none can be started (pids.max), the caller writes
    all by itself. For one caller at a time.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._in_memory = sparse.filesystem_magic(target.fd) == sparse.TMPFS_MAGIC
        self._begun = 0  # up to here the kernel was told to write out
        self._free: list[memoryview] = []
        self._pending: deque[Future[memoryview]] = deque()
        self._thread = _helper()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            while self._pending and error is None:
                self._pending.popleft().result()
        finally:
            if self._thread is not None:
                self._thread.shutdown(cancel_futures=error is not None)

    def buffer(self) -> memoryview:
        """A buffer of `BUFFER` bytes that no write needs any more: once more, or a new one."""
        if self._free:
            return self._free.pop()
        if len(self._pending) < _BUFFERS:
            return page_aligned(BUFFER)
        return self._pending.popleft().result()

    def write(self, buffer: memoryview, length: int, offset: int) -> None:
        """Write the first `length` bytes of a buffer, which is not to be touched any more."""
        if self._in_memory and self._thread is not None:
            self._pending.append(self._thread.submit(self._write, buffer, length, offset))
        else:
            self._free.append(self._write(buffer, length, offset))
            self.written(offset + length)

    def written(self, stop: int) -> None:
        """The file has its bytes up to `stop`; nothing lies there still to be written."""
        if self._thread is not None and stop - self._begun >= _WINDOW:
            self._thread.submit(_start_writeback, self._target.fd, self._begun, stop)
            self._begun = stop

    def _write(self, buffer: memoryview, length: int, offset: int) -> memoryview:
        with failures(self._target.path, self._target):
            write_at(self._target.fd, buffer[:length], offset)
        return buffer


def _helper() -> ThreadPoolExecutor | None:
    # Its thread begins now: one that fails to begin later leaves the work for it in its queue.
    helper = ThreadPoolExecutor(1, "write-behind")
    try:
        helper.submit(int)
    except RuntimeError:
        return None
    return helper


def _start_writeback(fd: int, start: int, stop: int) -> None:
    # Only the beginning of what the fsync does anyway: where there is no such call, it does it all.
    offset, count = ctypes.c_int64(start), ctypes.c_int64(stop - start)
    _libc.sync_file_range(fd, offset, count, _SYNC_FILE_RANGE_WRITE)
