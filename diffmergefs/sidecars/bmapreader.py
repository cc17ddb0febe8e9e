"""Parsing a bmap: an XML document from an untrusted source."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Mapping
from xml.parsers import expat

from diffmergefs.core.errors import SealError
from diffmergefs.sidecars.bmap import DIGEST, HEX, BlockMap

_MAX_TEXT = 128
_RANGE = re.compile(r"([0-9]{1,16})(?:-([0-9]{1,16}))?")
# The largest such number of bytes fits into an array of 64-bit integers.
_NUMBER = re.compile(r"[0-9]{1,18}")
_FIELDS = frozenset(
    {"ImageSize", "BlockSize", "BlocksCount", "MappedBlocksCount", "ChecksumType"}
    | {"BmapFileChecksum"}
)


def parse(data: bytes, name: str = "bmap") -> BlockMap:
    """The map in the XML document `data`; messages call it `name`.

    A DTD, an entity or an external reference is refused. Raises SealError if the document is not
    bmap 2, if its numbers contradict each other, if its ranges are out of order, overlap or lie
    beyond the end, or if its own checksum is wrong.
    """
    document = _Document()
    # Every trick with entities and external references needs a DTD.
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _refuse_dtd
    parser.StartElementHandler, parser.EndElementHandler = document.start, document.end
    parser.CharacterDataHandler, parser.buffer_text = document.data, True
    try:
        parser.Parse(data, True)
        found = document.block_map()
        _require_own_checksum(data, document.fields["BmapFileChecksum"])
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise SealError(
            f"{name}: not a usable bmap 2.0 file: {_reason(error)}; restore the one that was made"
            " with the layer, or ignore it with --no-seal; only if you know that the layer's holes"
            " are right, make a new one with `diffmergefs seal --force`"
        ) from error
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, expat.ExpatError):
        return f"not well-formed XML ({error})"
    return str(error)


def _refuse_dtd(*declaration: object) -> None:
    raise ValueError("it has a document type or entities")


class _Document:
    # Takes one element after another: a map of a million ranges is never held as a tree.

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self._version = ""
        self._depth = 0
        self._text: list[str] = []
        self._length = 0
        self._digest: str | None = None
        self._firsts, self._lasts = array("Q"), array("Q")
        self._digests = bytearray()
        self._bare: set[int] = set()

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        self._depth += 1
        self._text, self._length = [], 0
        if self._depth == 1:
            if name != "bmap":
                raise ValueError(f"the document is a {name[:_MAX_TEXT]!r}")
            self._version = attributes.get("version", "")
        elif name == "Range":
            self._digest = attributes.get("chksum")

    def data(self, content: str) -> None:
        if self._depth > 1:
            self._length += len(content)
            if self._length > _MAX_TEXT and content.strip():
                raise ValueError(f"a text of more than {_MAX_TEXT} characters")
            self._text.append(content)

    def end(self, name: str) -> None:
        self._depth -= 1
        if name == "Range":
            self._add("".join(self._text).strip())
        elif name in _FIELDS:
            if name in self.fields:
                raise ValueError(f"{name} occurs twice")
            self.fields[name] = "".join(self._text).strip()
        self._text, self._length = [], 0

    def _add(self, text: str) -> None:
        match = _RANGE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text[:_MAX_TEXT]!r} is not a range of blocks")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise ValueError(f"the range {text} ends before it begins")
        if self._lasts and first <= self._lasts[-1]:
            raise ValueError(f"the range {text} overlaps the one before, or is not in order")
        if self._digest is None:
            self._bare.add(len(self._firsts))
            self._digests += bytes(DIGEST)
        else:
            self._digests += _digest(self._digest)
        self._firsts.append(first)
        self._lasts.append(last)

    def block_map(self) -> BlockMap:
        if self._version.split(".")[0] != "2":
            raise ValueError(f"its version is {self._version[:_MAX_TEXT]!r}, not 2.0")
        size, block = self._number("ImageSize"), self._number("BlockSize")
        if size == 0 or block == 0 or block & (block - 1):
            raise ValueError(f"a size of {size} bytes in blocks of {block}")
        blocks = -(-size // block)
        mapped = sum(self._lasts) - sum(self._firsts) + len(self._firsts)
        if self._number("BlocksCount") != blocks:
            raise ValueError(f"{self.fields['BlocksCount']} blocks, but {size} bytes have {blocks}")
        if self._number("MappedBlocksCount") != mapped:
            raise ValueError(
                f"it records {self.fields['MappedBlocksCount']} mapped blocks, but has {mapped}"
            )
        if self._lasts and self._lasts[-1] >= blocks:
            raise ValueError(f"block {self._lasts[-1]} is mapped, beyond the end at {blocks}")
        if len(self._bare) < len(self._firsts) and self.fields["ChecksumType"] != "sha256":
            raise ValueError(f"checksums are {self.fields['ChecksumType'][:_MAX_TEXT]!r}")
        starts = array("Q", [first * block for first in self._firsts])
        stops = array("Q", [min((last + 1) * block, size) for last in self._lasts])
        return BlockMap(size, block, starts, stops, bytes(self._digests), frozenset(self._bare))

    def _number(self, name: str) -> int:
        if name not in self.fields:
            raise ValueError(f"{name} is missing")
        if not _NUMBER.fullmatch(self.fields[name]):
            raise ValueError(f"{name} is {self.fields[name][:_MAX_TEXT]!r}")
        return int(self.fields[name])


def _digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    # fromhex skips white space; then there are fewer bytes.
    if len(text) != HEX or len(digest) != DIGEST:
        raise ValueError(f"{text[:_MAX_TEXT]!r} is not a sha256")
    return digest


def _require_own_checksum(data: bytes, recorded: str) -> None:
    # The checksum is of the whole file with the checksum itself replaced by zeros.
    _digest(recorded)
    text = recorded.encode()
    where = data.find(text)
    digest = hashlib.sha256(data[:where])
    digest.update(b"0" * HEX)
    digest.update(memoryview(data)[where + HEX :])
    if where < 0 or digest.hexdigest() != recorded.lower():
        raise ValueError(f"its own checksum is {digest.hexdigest()}, it records {recorded}")
