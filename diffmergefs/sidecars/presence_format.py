"""The presence format of superserve's Firecracker: a bitmap of the pages that a diff holds.

Magic `FCPRSNC1`; page size and page count, u64 little-endian; the bitmap in words of u64
little-endian, page n being bit n % 64 of word n // 64; a CRC-64 of all that, little-endian.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from diffmergefs.core.errors import PresenceError
from diffmergefs.core.extents import ExtentList

PRESENCE_SUFFIX = ".presence"
MAX_BYTES = 64 << 20  # 2 TiB in pages of 4096

_MAGIC = b"FCPRSNC1"
_HEADER = struct.Struct("<8sQQ")
_CHECKSUM = struct.Struct("<Q")
_UNDERIVABLE = b"\x55"
_POLYNOMIAL = 0x95AC9329AC4BC9B5  # Jones's 0xad93d23594c935a9, reflected
_BITS = 64
_MIN_PAGE = 512
_AGAIN = "save the snapshot again"


@dataclass(frozen=True)
class Presence:
    """Which pages of `page` bytes a diff of `pages` pages holds, as `extents` of whole pages.

    The last page may reach beyond the end of the file.
    """

    page: int
    pages: int
    extents: ExtentList


@functools.cache
def _table() -> tuple[int, ...]:
    return tuple(functools.reduce(_shifted, range(8), byte) for byte in range(256))


def _shifted(value: int, _: int) -> int:
    return value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)


def crc64(data: bytes) -> int:
    """The CRC-64 of the format: Jones's polynomial, reflected, nothing before or after it."""
    table = _table()
    value = 0
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value


def parse(data: bytes, name: str = "presence") -> Presence:
    """The bitmap in `data`, a whole file; `name` stands in messages.

    Raises PresenceError, each with a reason of its own, for an empty file (a save that was
    interrupted), for the one byte 0x55 (a save that could not tell which pages are present), and
    for what is malformed: another magic, a page size that makes no sense, a length that does not
    fit the number of pages, a bit beyond the last page, a wrong checksum.
    """
    if not data:
        raise PresenceError(f"{name}: is empty (0 bytes): the save was torn; {_AGAIN}")
    if data == _UNDERIVABLE:
        raise PresenceError(
            f"{name}: holds the one byte 0x55: the save could not derive which pages are present;"
            " take a full snapshot instead"
        )
    try:
        return _parse(data)
    except ValueError as error:
        raise PresenceError(
            f"{name}: no presence file that can be used: {error}; copy it again together with its"
            f" diff, or {_AGAIN}"
        ) from error


def _parse(data: bytes) -> Presence:
    if len(data) < _HEADER.size + _CHECKSUM.size:
        raise ValueError(f"{len(data)} bytes are too few for a header and a checksum")
    magic, page, pages = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError(f"it begins with {magic!r}, not with {_MAGIC!r}")
    words = -(-pages // _BITS)
    expected = _HEADER.size + words * _CHECKSUM.size + _CHECKSUM.size
    if len(data) != expected:
        raise ValueError(f"{len(data)} bytes, but {pages} pages take {expected}")
    recorded, found = _CHECKSUM.unpack_from(data, expected - 8)[0], crc64(data[:-8])
    if recorded != found:
        raise ValueError(f"its CRC-64 is {found:#018x}, it records {recorded:#018x}")
    if page < _MIN_PAGE or page & (page - 1):
        raise ValueError(f"pages of {page} bytes, which is no power of two of at least {_MIN_PAGE}")
    if page * pages >= 1 << 63:
        raise ValueError(f"{pages} pages of {page} bytes are more than a file can have")
    bitmap = memoryview(data)[_HEADER.size : -_CHECKSUM.size]
    extents = ExtentList((a * page, b * page) for a, b in _runs(bitmap, pages))
    return Presence(page, pages, extents)


def _runs(bitmap: memoryview, pages: int) -> Iterator[tuple[int, int]]:
    # The runs of set bits; a run that goes on in the next word comes in two.
    for number, (word,) in enumerate(_CHECKSUM.iter_unpack(bitmap)):
        while word:
            first = (word & -word).bit_length() - 1
            rest = word + (1 << first)  # the carry stops at the first clear bit above the run
            stop = (rest & -rest).bit_length() - 1
            if number * _BITS + stop > pages:
                raise ValueError(f"a page beyond the last of {pages} is marked as present")
            yield number * _BITS + first, number * _BITS + stop
            word &= -1 << stop
