"""Replies to the kernel: attributes, errors and buffers in the form that pyfuse3 expects."""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, cast
from zlib import crc32

import pyfuse3
from pyfuse3 import FUSEError

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.sparse import BLOCK, page_aligned
from diffmergefs.fuse.marks import Marks, number_of
from diffmergefs.fuse.nodes import Attributes
from diffmergefs.fuse.status import Metrics
from diffmergefs.system.board import Mark

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# Names and the attributes of passed-through files may change. A memory file's attributes never do:
# changed ones would drop its cached pages under live mappings.
CHANGING_SECONDS = 0.5
CONSTANT_SECONDS = 365 * 86400

_IDLE_BUFFERS = 8  # the most that are kept for reuse


def answering(
    handler: Callable[P, Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """The handler, with every failure turned into an errno for the client.

    The handler's object has `metrics`, which count the request and its error, and `marks` of
    requests in hand. After any other exception pyfuse3 ends the server.
    """
    kind = crc32(handler.__name__.encode())

    async def answer_marked(mark: Mark, *args: P.args, **kwargs: P.kwargs) -> T:
        marks: Marks = cast(Any, args[0]).marks
        place = marks.begin(*mark)
        try:
            return await handler(*args, **kwargs)
        finally:
            marks.end(place)

    @functools.wraps(handler)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> T:
        operations = cast(Any, args[0])
        metrics: Metrics = operations.metrics
        marks: Marks = operations.marks
        metrics.requests[handler.__name__] += 1
        mark = kind, *(number_of(part) for part in (*args[1:3], 0, 0)[:3])
        try:
            if marks.is_watchful:
                async with marks.turn(mark):
                    return await answer_marked(mark, *args, **kwargs)
            return await answer_marked(mark, *args, **kwargs)
        except Exception as error:
            raise fuse_error(metrics, handler.__name__, error) from error

    return answer


def fuse_error(metrics: Metrics, handler: str, error: Exception) -> FUSEError:
    """The reply for a handler's error. It counts the error, and logs it."""
    number = errno.EIO
    if isinstance(error, FUSEError):
        number = error.errno
    elif isinstance(error, DiffMergeError):
        log.debug("%s: %s", handler, error)
        number = error.errno
    elif isinstance(error, OSError):
        level = logging.WARNING if error.errno == errno.EIO else logging.DEBUG
        log.log(level, "%s: %s", handler, error)
        number = error.errno or errno.EIO
    else:
        log.error("%s failed: this is a bug", handler, exc_info=error)
    metrics.errors[handler, number] += 1
    return FUSEError(number)


def entry_of(generation: int, inode: int, known: Attributes) -> pyfuse3.EntryAttributes:
    """The reply that describes a node."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = inode
    entry.generation = generation
    entry.entry_timeout = CHANGING_SECONDS
    entry.attr_timeout = CONSTANT_SECONDS if known.constant else CHANGING_SECONDS
    entry.st_mode = known.mode
    entry.st_uid, entry.st_gid = known.uid, known.gid
    entry.st_size, entry.st_blocks, entry.st_blksize = known.size, known.blocks, 4096
    entry.st_nlink = known.nlink
    entry.st_rdev = 0
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = known.mtime_ns
    return entry


def statvfs_of(size: int, files: int) -> pyfuse3.StatvfsData:
    """The reply that describes a full filesystem of this many bytes and files."""
    answer = pyfuse3.StatvfsData()
    answer.f_bsize = answer.f_frsize = 4096
    answer.f_blocks = -(-size // 4096)
    answer.f_bfree = answer.f_bavail = 0
    answer.f_files = files
    answer.f_ffree = answer.f_favail = 0
    answer.f_namemax = 255
    return answer


class Buffers:
    """A pool of buffers of any size; those of up to 1 MiB are reused. For one thread.

    A reused buffer still has its old contents. Reuse saves the page faults of a fresh buffer.
    """

    def __init__(self) -> None:
        self._shared = page_aligned(BLOCK)
        self._idle: list[memoryview] = []

    def shared(self, size: int) -> memoryview:
        """`size` bytes of the one shared buffer, valid until the next call."""
        return self._shared[:size] if size <= BLOCK else page_aligned(size)

    def take(self, size: int) -> memoryview:
        """A buffer of `size` bytes that nobody else uses until `give_back`."""
        if size > BLOCK:
            return page_aligned(size)
        # Pages that were never written take no memory, so a large buffer costs nothing.
        whole = self._idle.pop() if self._idle else page_aligned(BLOCK)
        return whole[:size]

    def give_back(self, buffer: memoryview) -> None:
        """Return a buffer that was taken. The pool keeps some of them and frees the rest."""
        whole = memoryview(buffer.obj)
        if len(whole) == BLOCK and len(self._idle) < _IDLE_BUFFERS:
            self._idle.append(whole)
