"""The regions of a VM's memory, as its VMM describes them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffmergefs.core.extents import PAGE

HUGE_PAGE = 2 << 20
_PAGES = (PAGE, HUGE_PAGE)
_MOST = 1024
_END = 1 << 64
_BLANK = b" \t\r\n\0"


class Region(NamedTuple):
    """`size` bytes of guest memory from the address `start` on, in pages of `page` bytes.

    `start` is an address in the VMM's process. `offset` is where these bytes are in the image.
    """

    start: int
    size: int
    offset: int
    page: int

    @property
    def end(self) -> int:
        """The address of the first byte after it."""
        return self.start + self.size


def parsed(text: bytes) -> list[Region] | None:
    """The regions in a VMM's message, or None if it is not complete yet.

    The message is an array in JSON; white space and NULs around it do not count. A page size is
    `page_size`, or else `page_size_kib`, which is in bytes too; without either it is 4096. Raises
    ValueError, with one line, if it cannot become such a message.
    """
    text = text.strip(_BLANK)
    if text and not text.startswith(b"["):
        raise ValueError(f"the message does not begin with '[', but with {text[:16]!r}")
    if not text.endswith(b"]"):
        return None
    try:
        document = json.loads(text.decode("ascii"))
    except json.JSONDecodeError as error:
        if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
            return None
        raise ValueError(f"the message is not JSON: {error}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the message is not JSON: {error}") from None
    if not 1 <= len(document) <= _MOST:
        raise ValueError(f"the message has {len(document)} regions, not 1 to {_MOST}")
    return [_region(fields) for fields in document]


def _region(fields: Any) -> Region:
    if not isinstance(fields, dict):
        raise ValueError(f"a region is no object: {str(fields)[:64]}")
    page = fields.get("page_size", fields.get("page_size_kib", PAGE))
    if fields.get("page_size_kib", page) != page:
        raise ValueError(f"a region has pages of {page} and of {fields['page_size_kib']} bytes")
    numbers: list[Any] = [
        fields.get(name) for name in ("base_host_virt_addr", "size", "offset")
    ] + [page]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < _END for n in numbers):
        raise ValueError(
            "a region whose base_host_virt_addr, size, offset and page size are"
            f" {str(numbers)[:128]}"
        )
    return Region(*numbers)


def require_fit(regions: Sequence[Region], size: int) -> None:
    """Raise ValueError, with one line and the numbers, unless the regions hold an image of `size`.

    They must have pages of 4096 bytes or of 2 MiB, begin and end on pages, not overlap, and
    together have each byte of the image once.
    """
    for region in regions:
        if region.page not in _PAGES:
            raise ValueError(f"a region has pages of {region.page} bytes, not of 4096 or 2097152")
        if region.size == 0 or any(n % region.page for n in region[:3]) or region.end > _END:
            raise ValueError(
                f"a region of {region.size} bytes at {region.start:#x}, for the image's bytes from"
                f" {region.offset} on, does not consist of pages of {region.page} bytes"
            )
    for one, other in itertools.pairwise(sorted(regions)):
        if other.start < one.end:
            raise ValueError(f"regions overlap at {other.start:#x}")
    place = 0
    for region in sorted(regions, key=lambda region: region.offset):
        if region.offset != place:
            raise ValueError(
                f"no region or more than one is for the image's byte {min(region.offset, place)}"
            )
        place += region.size
    if place != size:
        raise ValueError(f"the regions have {place} bytes, and the image has {size}")
