"""The presence format: check values, every malformed file, and any bitmap against its pages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.core.errors import PresenceError
from diffmergefs.sidecars import presence_format
from tests.support.images import PAGE
from tests.support.superserve import crc64, presence


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"123456789", 0xE9C6D914C4B8D9CA), (b"FCPRSNC1", 0x9FEE52A36DD3C749), (b"", 0)],
)
def test_the_check_values_of_the_checksum(data: bytes, expected: int) -> None:
    assert presence_format.crc64(data) == expected == crc64(data)


@given(st.binary(max_size=100))
@settings(max_examples=50, deadline=None)
def test_any_checksum_is_that_of_the_long_division(data: bytes) -> None:
    assert presence_format.crc64(data) == crc64(data)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
@settings(max_examples=100, deadline=None)
def test_the_extents_are_the_runs_of_present_pages(drawn: tuple[int, set[int]]) -> None:
    count, numbers = drawn
    found = presence_format.parse(presence(numbers, count, 512))
    assert (found.page, found.pages) == (512, count)
    held = {n for start, stop in found.extents for n in range(start // 512, stop // 512)}
    assert held == numbers
    assert all(start % 512 == stop % 512 == 0 for start, stop in found.extents)
    runs = [n for n in numbers if n - 1 not in numbers]
    assert len(found.extents) == len(runs)  # joined across words


def test_bit_n_of_word_m_is_page_64_m_plus_n() -> None:
    text = presence([0, 63, 64, 65, 127, 130], 131)
    words = [int.from_bytes(text[n : n + 8], "little") for n in (24, 32, 40)]
    assert words == [1 | 1 << 63, 1 | 2 | 1 << 63, 4]
    starts = [start // PAGE for start, _ in presence_format.parse(text).extents]
    assert starts == [0, 63, 127, 130]


def test_no_page_and_all_pages() -> None:
    assert list(presence_format.parse(presence([], 70)).extents) == []
    assert list(presence_format.parse(presence(range(70), 70)).extents) == [(0, 70 * PAGE)]


GOOD = presence([1, 2], 16)


def with_checksum(body: bytes) -> bytes:
    return body + crc64(body).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty (0 bytes): the save was torn"),
        (b"\x55", "holds the one byte 0x55: the save could not derive which pages are present"),
        (b"\x56", "1 bytes are too few"),
        (GOOD[:39], "39 bytes"),
        (GOOD + b"\0", "41 bytes, but 16 pages take 40"),
        (GOOD[:-8], "32 bytes, but 16 pages take 40"),
        (presence([1], 16, magic=b"FCPRSNC2"), "it begins with b'FCPRSNC2', not with b'FCPRSNC1'"),
        (GOOD[:24] + b"\7" + GOOD[25:], "its CRC-64 is 0x"),
        (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "it records 0x"),
        (presence([1], 16, page=0), "pages of 0 bytes, which is no power of two"),
        (presence([1], 16, page=256), "pages of 256 bytes"),
        (presence([1], 16, page=4097), "pages of 4097 bytes"),
        (presence([1], 16, page=1 << 62), "are more than a file can have"),
        (with_checksum(GOOD[:16] + (1 << 63).to_bytes(8, "little")), "32 bytes, but"),
        (with_checksum(GOOD[:24] + (1 << 16).to_bytes(8, "little")), "beyond the last of 16"),
        (with_checksum(GOOD[:24] + b"\xff" * 8), "beyond the last of 16"),
        # Where a page begins there is more than 64 bits hold.
        (with_checksum(presence([], 1, 1 << 62)[:24] + b"\xff" * 8), "beyond the last of 1 "),
    ],
)
def test_what_is_malformed_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(PresenceError) as caught:
        presence_format.parse(data, "there/mem.diff.presence")
    text = str(caught.value)
    assert reason in text and text.startswith("there/mem.diff.presence: ")
    assert len(text.splitlines()) == 1
