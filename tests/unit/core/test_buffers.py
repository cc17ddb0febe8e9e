"""Where the buffers lie that bulk reads go into."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from diffmergefs.core.buffers import BLOCK, Buffers, page_aligned


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
