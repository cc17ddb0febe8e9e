"""Replies to the kernel: the errno of a failure, attributes field by field, and buffers."""

from __future__ import annotations

import errno
import logging
from collections.abc import Coroutine
from math import inf
from typing import Any
from zlib import crc32

import pytest
import trio
from pyfuse3 import FUSEError

from diffmergefs.core.errors import DiffMergeError, WriterError
from diffmergefs.core.sparse import BLOCK
from diffmergefs.fuse.marks import Marks
from diffmergefs.fuse.nodes import Attributes
from diffmergefs.fuse.replies import Buffers, answering, entry_of, statvfs_of
from diffmergefs.fuse.status import Metrics
from diffmergefs.system.board import Board, Mark
from tests.support.images import PAGE, offset_in_page


class Adapter:
    """Handlers, of which one returns its argument and the other raises it."""

    def __init__(self, board: Board | None = None, **marks: Any) -> None:
        self.metrics = Metrics()
        self.board = board or Board()
        self.marks = Marks(self.board, **marks)

    @answering
    async def give(self, value: object) -> object:
        return value

    @answering
    async def fail(self, error: Exception) -> None:
        raise error

    @answering
    async def tell(self, *arguments: object) -> frozenset[Mark]:
        return self.board.in_hand()


def run(coroutine: Coroutine[Any, Any, Any]) -> object:
    """What a coroutine returns that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


def test_an_answer_passes_and_is_counted() -> None:
    adapter = Adapter()
    assert run(adapter.give("it")) == "it"
    assert dict(adapter.metrics.requests) == {"give": 1}
    assert not adapter.metrics.errors


@pytest.mark.parametrize(
    ("error", "number", "level"),
    [
        (FUSEError(errno.ESTALE), errno.ESTALE, None),
        (WriterError("a layer is being written"), errno.EBUSY, logging.DEBUG),
        (DiffMergeError("a layer"), DiffMergeError.errno, logging.DEBUG),
        (FileNotFoundError(errno.ENOENT, "No such file"), errno.ENOENT, logging.DEBUG),
        (OSError(errno.EIO, "Input/output error"), errno.EIO, logging.WARNING),
        (OSError("without a number"), errno.EIO, logging.DEBUG),
        (ZeroDivisionError("a bug"), errno.EIO, logging.ERROR),
    ],
    ids=repr,
)
def test_a_failure_is_an_errno_for_the_client_and_is_counted(
    error: Exception, number: int, level: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    adapter = Adapter()
    with pytest.raises(FUSEError) as caught:
        run(adapter.fail(error))
    assert caught.value.errno == number
    assert dict(adapter.metrics.errors) == {("fail", number): 1}
    assert [record.levelno for record in caplog.records] == ([] if level is None else [level])


def test_a_request_is_marked_while_it_is_in_hand() -> None:
    adapter = Adapter()
    kind = crc32(b"tell")
    for arguments, numbers in (
        ((5,), (5, 0, 0)),
        ((5, b"name", "context"), (5, crc32(b"name"), 0)),
    ):
        assert run(adapter.tell(*arguments)) == {(kind, *numbers)}
        assert not adapter.board.in_hand()
    with pytest.raises(FUSEError):
        run(adapter.fail(OSError(errno.EIO, "on purpose")))
    assert not adapter.board.in_hand()


def test_a_poisoned_request_is_refused_and_counted() -> None:
    mark = (crc32(b"tell"), 5, 0, 0)
    adapter = Adapter(poisoned={mark: inf})
    with pytest.raises(FUSEError) as caught:
        run(adapter.tell(5))
    assert caught.value.errno == errno.EIO
    assert dict(adapter.metrics.errors) == {("tell", errno.EIO): 1}
    assert run(adapter.tell(6)) and not adapter.board.in_hand()


def test_a_suspect_that_was_answered_is_cleared() -> None:
    mark, cleared = (crc32(b"tell"), 5, 0, 0), list[Mark]()
    adapter = Adapter(suspects=frozenset({mark}), clear=cleared.append)
    trio.run(adapter.tell, 6)
    assert not cleared
    trio.run(adapter.tell, 5)
    trio.run(adapter.tell, 5)
    assert cleared == [mark]


@pytest.mark.parametrize("constant", [False, True])
def test_an_entry_has_the_attributes_and_only_constant_ones_are_cached_for_long(
    constant: bool,
) -> None:
    known = Attributes(0o100440, 11, 12, 5000, 16, 2, 1_234_567_891, constant)
    entry = entry_of(3, 77, known)
    assert (entry.st_ino, entry.generation) == (77, 3)
    assert (entry.st_mode, entry.st_uid, entry.st_gid) == (0o100440, 11, 12)
    assert (entry.st_size, entry.st_blocks, entry.st_nlink) == (5000, 16, 2)
    assert {entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns} == {1_234_567_891}
    assert entry.entry_timeout < 1
    assert (entry.attr_timeout > 86400) == constant


@pytest.mark.parametrize(("size", "blocks"), [(0, 0), (1, 1), (4096, 1), (4097, 2)])
def test_a_filesystem_is_full_and_its_size_is_rounded_up(size: int, blocks: int) -> None:
    answer = statvfs_of(size, 9)
    assert answer.f_blocks * answer.f_frsize == blocks * 4096
    assert answer.f_files == 9
    assert not (answer.f_bfree or answer.f_bavail or answer.f_ffree or answer.f_favail)


@pytest.mark.parametrize("size", [1, 4096, BLOCK, BLOCK + 1])
def test_replies_begin_on_a_page(size: int) -> None:
    buffers = Buffers()
    shared, taken = buffers.shared(size), buffers.take(size)
    assert (len(shared), len(taken)) == (size, size)
    assert (offset_in_page(shared), offset_in_page(taken)) == (0, 0)
    taken[:] = b"x" * size
    assert not any(shared)


def test_each_buffer_has_one_user_at_a_time_and_is_reused() -> None:
    buffers = Buffers()
    one, two = buffers.take(PAGE), buffers.take(BLOCK)
    assert (len(one), len(two)) == (PAGE, BLOCK)
    assert one.obj is not two.obj
    shared = buffers.shared(PAGE).obj
    assert shared is buffers.shared(7).obj
    assert shared is not one.obj and shared is not two.obj
    buffers.give_back(one)
    assert buffers.take(10).obj is one.obj
    # Buffers larger than the kernel's requests are not kept.
    large = buffers.take(BLOCK + 1)
    assert len(large) == BLOCK + 1 == len(buffers.shared(BLOCK + 1))
    buffers.give_back(large)
    assert buffers.take(1).obj is not large.obj


def test_only_a_few_idle_buffers_are_kept() -> None:
    buffers = Buffers()
    taken = [buffers.take(1) for _ in range(64)]
    for buffer in taken:
        buffers.give_back(buffer)
    assert len(buffers._idle) == 8
