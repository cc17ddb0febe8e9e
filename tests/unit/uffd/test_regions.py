"""Regions: as VMMs of several versions send them, and everything that is no such thing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diffmergefs.uffd.regions import HUGE_PAGE, Region, parsed, require_fit

PAGE = 4096


def message(**fields: Any) -> bytes:
    known = {"base_host_virt_addr": 8 * PAGE, "size": 2 * PAGE, "offset": 0}
    return json.dumps([known | fields]).encode()


@pytest.mark.parametrize(
    ("fields", "page"),
    [
        ({}, PAGE),
        ({"page_size_kib": PAGE}, PAGE),
        ({"page_size": HUGE_PAGE}, HUGE_PAGE),
        ({"page_size": HUGE_PAGE, "page_size_kib": HUGE_PAGE}, HUGE_PAGE),
        ({"page_size": PAGE, "something": "new"}, PAGE),
    ],
)
def test_a_message_of_any_version_is_understood(fields: dict[str, Any], page: int) -> None:
    assert parsed(message(**fields)) == [Region(8 * PAGE, 2 * PAGE, 0, page)]
    assert parsed(b" \n" + message(**fields) + b"\r\n\0") is not None


def test_each_part_of_a_message_is_incomplete() -> None:
    whole = json.dumps([{**json.loads(message())[0], "nested": [[1], "]"]}] * 3).encode()
    assert [parsed(whole[:length]) for length in range(len(whole))] == [None] * len(whole)
    assert len(parsed(whole) or []) == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"GET / HTTP/1.1", "does not begin with '\\['"),
        (b"{}", "does not begin"),
        (b"[}]", "not JSON"),
        (b'["\xff"]', "not JSON"),
        (b"[]", "has 0 regions"),
        (b"[" + b"{}," * 2000 + b"{}]", "has 2001 regions"),
        (b"[1]", "is no object: 1"),
        (b"[{}]", "None, None, None, 4096"),
        (message(size=-1), "-1"),
        (message(size=1.5), "1.5"),
        (message(offset=True), "True"),
        (message(size=1 << 64), str(1 << 64)),
        (message(page_size="4096"), "'4096'"),
        (message(page_size=PAGE, page_size_kib=4), "pages of 4096 and of 4 bytes"),
        (message() + b"x]", "Extra data"),
    ],
)
def test_anything_else_is_refused_in_one_line(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as found:
        parsed(text)
    assert "\n" not in str(found.value)


def test_regions_that_hold_the_image_fit() -> None:
    two = [Region(8 * PAGE, PAGE, 2 * PAGE, PAGE), Region(20 * PAGE, 2 * PAGE, 0, PAGE)]
    require_fit(two, 3 * PAGE)
    require_fit([Region(HUGE_PAGE, 2 * HUGE_PAGE, 0, HUGE_PAGE)], 2 * HUGE_PAGE)


@pytest.mark.parametrize(
    ("regions", "reason"),
    [
        ([(PAGE, PAGE, 0, 16384)], "pages of 16384 bytes"),
        ([(PAGE, 0, 0, PAGE)], "a region of 0 bytes"),
        ([(PAGE + 1, PAGE, 0, PAGE)], "at 0x1001"),
        ([(PAGE, PAGE - 1, 0, PAGE)], "4095 bytes"),
        ([(PAGE, 2 * PAGE, 0, HUGE_PAGE)], "does not consist of pages of 2097152 bytes"),
        ([((1 << 64) - PAGE, 2 * PAGE, 0, PAGE)], "8192 bytes"),
        ([(PAGE, 2 * PAGE, 0, PAGE), (2 * PAGE, PAGE, 2 * PAGE, PAGE)], "overlap at 0x2000"),
        ([(PAGE, PAGE, 0, PAGE), (8 * PAGE, PAGE, 2 * PAGE, PAGE)], "image's byte 4096"),
        ([(PAGE, 2 * PAGE, 0, PAGE), (8 * PAGE, PAGE, PAGE, PAGE)], "image's byte 4096"),
        ([(PAGE, PAGE, PAGE, PAGE)], "image's byte 0"),
        ([(PAGE, 2 * PAGE, 0, PAGE)], "the regions have 8192 bytes, and the image has 12288"),
        ([(PAGE, 4 * PAGE, 0, PAGE)], "the regions have 16384 bytes, and the image has 12288"),
    ],
)
def test_regions_that_do_not_hold_it_are_refused(
    regions: list[tuple[int, int, int, int]], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        require_fit([Region(*region) for region in regions], 3 * PAGE)
