"""Where the buffers lie that bulk reads go into."""

from __future__ import annotations

import mmap

import pytest

from diffmergefs.core.buffers import BLOCK, page_aligned
from tests.support.images import offset_in_page


@pytest.mark.parametrize("size", [1, mmap.PAGESIZE - 1, 1 << 18, 3 * BLOCK + 5])
def test_a_page_aligned_buffer_is_zeros_from_the_start_of_a_page(size: int) -> None:
    buffer = page_aligned(size)
    assert len(buffer) == size and not any(buffer)
    assert offset_in_page(buffer) == 0
    buffer[-1] = 7
    assert buffer[-1] == 7
