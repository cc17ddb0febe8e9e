"""Where the buffers lie that bulk reads go into."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from diffmergefs.core.buffers import BLOCK, Buffers, page_aligned
from tests.support.images import PAGE


def offset_in_page(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % mmap.PAGESIZE


@pytest.mark.parametrize("size", [1, mmap.PAGESIZE - 1, 1 << 18, 3 * BLOCK + 5])
def test_a_page_aligned_buffer_is_zeros_from_the_start_of_a_page(size: int) -> None:
    buffer = page_aligned(size)
    assert len(buffer) == size and not any(buffer)
    assert offset_in_page(buffer) == 0
    buffer[-1] = 7
    assert buffer[-1] == 7


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
