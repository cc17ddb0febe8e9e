"""Documents in the bmap 2.0 format: what a reader accepts and what it refuses."""

from __future__ import annotations

import hashlib

import pytest

from diffmergefs.core.errors import SealError
from diffmergefs.sidecars.bmap import BlockMap
from diffmergefs.sidecars.bmapreader import parse

BLOCK = 4096


ZEROS = "0" * 64


SUM = "ab" * 32


def document(ranges: str, *, size: int = 10 * BLOCK, mapped: int = 1, **fields: str) -> bytes:
    """A document with right numbers, but for those in `fields`, and a right checksum of its own."""
    known = {
        "ImageSize": str(size),
        "BlockSize": str(BLOCK),
        "BlocksCount": str(-(-size // BLOCK)),
        "MappedBlocksCount": str(mapped),
        "ChecksumType": "sha256",
        "BmapFileChecksum": ZEROS,
    } | fields
    lines = "".join(f"<{name}> {text} </{name}>\n" for name, text in known.items() if text)
    text = f'<bmap version="2.0">\n{lines}<BlockMap>{ranges}</BlockMap></bmap>\n'.encode()
    return sealed(text)


def sealed(text: bytes) -> bytes:
    return text.replace(ZEROS.encode(), hashlib.sha256(text).hexdigest().encode(), 1)


def ranges_of(found: BlockMap) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop, _ in found.ranges()]


def test_a_document_without_ranges() -> None:
    assert ranges_of(parse(document("", mapped=0))) == []


def test_single_blocks_and_ranges_without_a_checksum() -> None:
    text = f'<Range chksum="{SUM}"> 1 </Range><Range>3-4</Range>'
    found = parse(document(text, mapped=3))
    assert ranges_of(found) == [(BLOCK, 2 * BLOCK), (3 * BLOCK, 5 * BLOCK)]
    assert [r.digest for r in found.ranges()] == [bytes.fromhex(SUM), None]


def test_comments_and_unknown_elements_are_passed_over() -> None:
    text = document(f'<!-- x --><New a="b">1</New><Range chksum="{SUM}">1</Range>')
    assert ranges_of(parse(text)) == [(BLOCK, 2 * BLOCK)]


RANGE = f'<Range chksum="{SUM}">1</Range>'


WRONG: list[tuple[bytes, str]] = [
    (b"", "no element found"),
    (b"{}", "not well-formed XML"),
    (b"<bmap>", "no element found"),
    (b"<html/>", "the document is a 'html'"),
    (sealed(b"<bmap/>"), "its version is ''"),
    (document(RANGE).replace(b'"2.0"', b'"1.4"'), "its version is '1.4'"),
    (document(RANGE).replace(b'"2.0"', b'"3.0"'), "its version is '3.0'"),
    (document(RANGE, ImageSize=""), "ImageSize is missing"),
    (document(RANGE, ImageSize="0"), "a size of 0 bytes"),
    (document(RANGE, ImageSize="-1"), "ImageSize is '-1'"),
    (document(RANGE, ImageSize="1e3"), "ImageSize is '1e3'"),
    (document(RANGE, size=10**18), "ImageSize is '1000000000000000000'"),
    (document(RANGE, BlockSize="3000"), "in blocks of 3000"),
    (document(RANGE, BlocksCount="11"), "11 blocks, but 40960 bytes have 10"),
    (document(RANGE, mapped=2), "it records 2 mapped blocks, but has 1"),
    (document(RANGE, ChecksumType="md5"), "checksums are 'md5'"),
    (document(RANGE, ChecksumType=""), "'ChecksumType'"),
    (document(RANGE, BmapFileChecksum=""), "'BmapFileChecksum'"),
    (document(RANGE, BmapFileChecksum="ab"), "'ab' is not a sha256"),
    (document(RANGE, BmapFileChecksum=SUM), "its own checksum is"),
    (document(RANGE).replace(b"40960", b"40961"), "its own checksum is|40961 bytes have 11"),
    (document("<Range>10</Range>"), "block 10 is mapped, beyond the end at 10"),
    (document("<Range>3-2</Range>"), "ends before it begins"),
    (document("<Range>2-4</Range><Range>4-5</Range>", mapped=5), "overlaps the one before"),
    (document("<Range>4</Range><Range>2</Range>", mapped=2), "not in order"),
    (document("<Range>a</Range>"), "'a' is not a range of blocks"),
    (document("<Range></Range>"), "'' is not a range of blocks"),
    (document(f"<Range>{'9' * 17}</Range>"), "is not a range of blocks"),
    (document('<Range chksum="xyz">1</Range>'), "'xyz' is not a sha256"),
    (document(f'<Range chksum="{"g" * 64}">1</Range>'), "'" + "g" * 64 + "' is not a sha256"),
    (document(f"<Range>{'x' * 200}</Range>"), "a text of more than 128 characters"),
    (document(RANGE + "<ImageSize> 40960 </ImageSize>"), "ImageSize occurs twice"),
    (b"<!DOCTYPE bmap>" + document(RANGE), "a document type or entities"),
    (
        b'<!DOCTYPE bmap [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
        + document("<Range>&x;</Range>"),
        "a document type or entities",
    ),
]


@pytest.mark.parametrize(("text", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_what_is_not_right_is_refused_in_one_line_with_its_name(text: bytes, reason: str) -> None:
    with pytest.raises(SealError, match=reason) as caught:
        parse(text, "layer.bmap")
    said = str(caught.value)
    assert said.startswith("layer.bmap: not a usable bmap 2.0 file: ")
    assert "\n" not in said and "--no-seal" in said
    assert said.endswith("are right, make a new one with `diffmergefs seal --force`")
