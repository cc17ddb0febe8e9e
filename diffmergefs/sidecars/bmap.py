"""The bmap 2.0 format: which blocks of a file are data, with a checksum for each range of them.

bmaptool(1) writes and reads it: https://github.com/yoctoproject/bmaptool
"""

from __future__ import annotations

import errno
import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from diffmergefs.core.extents import ExtentList

SEAL_SUFFIX = ".bmap"
# If the name is too long with the suffix, there can be no seal.
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
MAX_BYTES = 1 << 30
DIGEST = hashlib.sha256().digest_size
HEX = DIGEST * 2


class Range(NamedTuple):
    """A mapped range `[start, stop)` in bytes, and the sha256 of its content if one is recorded."""

    start: int
    stop: int
    digest: bytes | None


@dataclass(frozen=True)
class BlockMap:
    """A map of a file of `size` bytes in blocks of `block` bytes.

    `starts` and `stops` are the mapped ranges in bytes, ascending and disjoint (they may be
    adjacent), the last one cut at the size. `digests` has 32 bytes for each range; they are
    meaningless if the range's number is in `bare`.
    """

    size: int
    block: int
    starts: array[int]
    stops: array[int]
    digests: bytes
    bare: frozenset[int]

    def __len__(self) -> int:
        return len(self.starts)

    def ranges(self, first: int = 0, stop: int | None = None) -> Iterator[Range]:
        """The ranges from number `first` up to, not including, number `stop`."""
        for n in range(first, len(self) if stop is None else stop):
            digest = None if n in self.bare else self.digests[n * DIGEST : (n + 1) * DIGEST]
            yield Range(self.starts[n], self.stops[n], digest)

    def extents(self) -> ExtentList:
        """The ranges as data extents, adjacent ones joined."""
        return ExtentList(zip(self.starts, self.stops, strict=True))


_HEAD = """<?xml version="1.0" ?>
<!-- The data blocks of a sparse file, as diffmergefs and bmaptool read them: what is not in a
     range is a hole, whatever a filesystem says of a copy. Each chksum is the sha256 of a range,
     cut at the end of the file. -->
<bmap version="2.0">
    <ImageSize> {size} </ImageSize>
    <BlockSize> {block} </BlockSize>
    <BlocksCount> {blocks} </BlocksCount>
    <MappedBlocksCount> {mapped} </MappedBlocksCount>
    <ChecksumType> sha256 </ChecksumType>
    <BmapFileChecksum> {zeros} </BmapFileChecksum>
    <BlockMap>
"""
_TAIL = """    </BlockMap>
</bmap>
"""


def dump(found: BlockMap) -> bytes:
    """The map as an XML document that `bmapreader.parse` and bmaptool(1) can read.

    The same map always gives the same bytes. Ranges must begin and end on blocks; the last may end
    with the file.
    """
    block = found.block
    lines, mapped = [], 0
    for start, stop, digest in found.ranges():
        first, last = start // block, (stop - 1) // block
        mapped += last - first + 1
        text = str(first) if first == last else f"{first}-{last}"
        checksum = f' chksum="{digest.hex()}"' if digest else ""
        lines.append(f"        <Range{checksum}> {text} </Range>\n")
    head = _HEAD.format(
        size=found.size,
        block=block,
        blocks=-(-found.size // block),
        mapped=mapped,
        zeros="0" * HEX,
    )
    document = (head + "".join(lines) + _TAIL).encode()
    own = hashlib.sha256(document).hexdigest()
    return document.replace(b"0" * HEX, own.encode(), 1)
