"""The bmap 2.0 format: what is written is read back, and what is not right is refused."""

from __future__ import annotations

import hashlib
import re
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmergefs.core.errors import SealError
from diffmergefs.sidecars.bmap import DIGEST, BlockMap, dump
from diffmergefs.sidecars.bmapreader import parse

BLOCK = 4096


def block_map(*ranges: tuple[int, int], size: int = 10 * BLOCK, block: int = BLOCK) -> BlockMap:
    starts = array("Q", [start for start, _ in ranges])
    stops = array("Q", [stop for _, stop in ranges])
    digests = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(len(ranges)))
    return BlockMap(size, block, starts, stops, digests, frozenset())


@st.composite
def block_maps(draw: st.DrawFn) -> BlockMap:
    block = draw(st.sampled_from([1, 512, 4096, 65536]))
    borders = sorted(draw(st.sets(st.integers(0, 1 << 30), max_size=20)))
    pairs = list(zip(borders[::2], borders[1::2], strict=False))
    last = pairs[-1][1] * block if pairs else 0
    size = max(1, last - draw(st.integers(0, block - 1)) if last else 1)
    stops = [min(stop * block, size) for _, stop in pairs]
    bare = draw(st.sets(st.integers(0, max(len(pairs) - 1, 0)))) if pairs else set()
    digests = b"".join(
        bytes(DIGEST) if n in bare else hashlib.sha256(b"%d" % n).digest()
        for n in range(len(pairs))
    )
    starts = array("Q", [start * block for start, _ in pairs])
    return BlockMap(size, block, starts, array("Q", stops), digests, frozenset(bare))


@given(block_maps())
def test_what_is_written_is_read_back(made: BlockMap) -> None:
    assert parse(dump(made)) == made
    assert dump(parse(dump(made))) == dump(made)


def test_a_map_gives_its_ranges_and_extents() -> None:
    made = block_map((0, BLOCK), (BLOCK, 3 * BLOCK), (9 * BLOCK, 10 * BLOCK - 5), size=40955)
    found = parse(dump(made))
    assert len(found) == 3
    assert [r.digest for r in found.ranges()] == [
        hashlib.sha256(b"%d" % n).digest() for n in (0, 1, 2)
    ]
    assert [r.start for r in found.ranges(1, 2)] == [BLOCK]
    assert list(found.extents()) == [(0, 3 * BLOCK), (9 * BLOCK, 40955)]


def test_a_map_without_ranges() -> None:
    assert len(parse(dump(block_map()))) == 0


def test_any_byte_of_a_map_that_is_turned_is_refused_or_means_the_same() -> None:
    made = block_map((0, BLOCK), (3 * BLOCK, 5 * BLOCK))
    text = dump(made)
    for at in range(len(text)):
        turned = text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :]
        with pytest.raises(SealError):
            parse(turned)


def test_the_form_is_that_of_bmaptool() -> None:
    text = dump(block_map((0, BLOCK), (3 * BLOCK, 5 * BLOCK))).decode()
    assert re.search(r"<ImageSize> 40960 </ImageSize>", text)
    assert re.search(r"<MappedBlocksCount> 3 </MappedBlocksCount>", text)
    assert re.search(r'<Range chksum="[0-9a-f]{64}"> 0 </Range>', text)
    assert re.search(r'<Range chksum="[0-9a-f]{64}"> 3-4 </Range>', text)
