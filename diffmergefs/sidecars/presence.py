"""A diff's presence file: `FILE.presence` beside it says which of its pages are data.

The format is superserve's Firecracker's: magic `FCPRSNC1`; page size and page count, u64
little-endian; the bitmap in words of u64 little-endian, page n being bit n % 64 of word n // 64; a
CRC-64 of all that, little-endian.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from diffmergefs.core.errors import PresenceError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer, Record
from diffmergefs.sidecars.seal import Format, Stored
from diffmergefs.sidecars.verified import Remembered

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
KIND = "presence"


@dataclass(frozen=True)
class Presence:
    """Which pages of `page` bytes a diff of `pages` pages holds, as `extents` of whole pages.

    The last page may extend beyond the end of the file.
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
    """The CRC-64 of the format: Jones's polynomial, reflected, initial and final value zero."""
    table = _table()
    value = 0
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value


def parse(data: bytes, name: str = "presence") -> Presence:
    """The bitmap in `data`, a whole file; messages call it `name`.

    Raises PresenceError, each with its own reason, for an empty file (an interrupted save), for the
    single byte 0x55 (a save that could not derive which pages are present), and for a malformed
    file: a wrong magic, an impossible page size, a length that does not match the number of pages,
    a bit beyond the last page, a wrong checksum.
    """
    if not data:
        raise PresenceError(f"{name}: is empty (0 bytes): the save was interrupted; {_AGAIN}")
    if data == _UNDERIVABLE:
        raise PresenceError(
            f"{name}: is the single byte 0x55: the save could not derive which pages are present;"
            " take a full snapshot instead"
        )
    try:
        return _parse(data)
    except ValueError as error:
        raise PresenceError(
            f"{name}: not a usable presence file: {error}; copy it again together with its diff,"
            f" or {_AGAIN}"
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
        raise ValueError(f"pages of {page} bytes: not a power of two of at least {_MIN_PAGE}")
    if page * pages >= 1 << 63:
        raise ValueError(f"{pages} pages of {page} bytes are more than a file can have")
    bitmap = memoryview(data)[_HEADER.size : -_CHECKSUM.size]
    extents = ExtentList((a * page, b * page) for a, b in _runs(bitmap, pages))
    return Presence(page, pages, extents)


def _runs(bitmap: memoryview, pages: int) -> Iterator[tuple[int, int]]:
    # The runs of set bits; a run that continues in the next word comes as two.
    for number, (word,) in enumerate(_CHECKSUM.iter_unpack(bitmap)):
        while word:
            first = (word & -word).bit_length() - 1
            rest = word + (1 << first)  # the carry stops at the first clear bit above the run
            stop = (rest & -rest).bit_length() - 1
            if number * _BITS + stop > pages:
                raise ValueError(f"a page beyond the last of {pages} is marked as present")
            yield number * _BITS + first, number * _BITS + stop
            word &= -1 << stop


_PRESENCE = Format(
    PRESENCE_SUFFIX, PresenceError, MAX_BYTES, f"a presence file has at most {MAX_BYTES}", parse
)
find = _PRESENCE.find


def adopt(layer: Layer, found: Stored[Presence]) -> None:
    """Put the bitmap's extents in force. Raises PresenceError if it is for another size."""
    bits = found.content
    expected = -(-layer.size // bits.page)
    if bits.pages != expected:
        raise PresenceError(
            f"{found.path}: for {bits.pages} pages of {bits.page} bytes, but {layer.path} has"
            f" {layer.size} bytes, which are {expected} pages; they do not belong together"
        )
    # The last page may extend beyond the end of the file.
    extents = ExtentList((start, min(stop, layer.size)) for start, stop in bits.extents)
    layer.adopt(extents, Record(PRESENCE_SUFFIX, found.path, found.key, bits.page))


def compare(layer: Layer, found: Stored[Presence]) -> None:
    """Raise PresenceError unless all bytes of the layer outside its present pages are zeros.

    Nothing else binds a presence file to its diff: data in a page that is not marked as present
    shows that they are not from the same save. Holes of the filesystem are not read. The
    fingerprint is compared at the end (law 6). Blocks. Raises LayerChangedError and OSError.
    """
    for start, stop in layer.walked.outside(layer.extents):
        if not layer.is_zero(start, stop):
            raise PresenceError(
                f"{found.path}: marks bytes [{start}, {stop}) of {layer.path} as absent, but they"
                " are not zeros: it is from another save; copy both files again, or save the"
                " snapshot again"
            )
    layer.check_unchanged()


def compare_once(
    layer: Layer, found: Stored[Presence], memory: Remembered, *, anew: bool = False
) -> None:
    """`compare`, unless `memory` has an earlier success and `anew` is false.

    Raises like `compare`, but FileAccessError instead of OSError.
    """
    memory.compare_once(KIND, layer, found.digest, lambda: compare(layer, found), anew=anew)
