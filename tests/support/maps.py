"""Random block maps (bmap 2.0), from nearly right to not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hypothesis import strategies as st

_ONE_IN_FOUR = st.integers(0, 3).map(lambda n: n == 3)
_ZEROS = "0" * 64
_ODD_NUMBERS = st.sampled_from(
    ["", "-1", "0", "00", "1.5", "1e3", "0x10", "٣", "1_0", "+4", "9" * 30, "9" * 5000, "nan", "\t"]
)
_SIZES = st.sampled_from([1, 12289, 0, 1 << 44, (1 << 44) + 1, 1 << 63, 10**18, 10**20 - 1])
_BLOCKS = st.sampled_from([4096, 4096, 4096, 4096, 512, 16384, 3, 0, 1 << 40])
_RIGHT = "right"
_HASHES = st.sampled_from(
    [*[_RIGHT] * 20, *[None] * 4, _ZEROS, "a" * 64, "A" * 64, "a" * 63, "", "g" * 64]
)
_NUMBERS = st.integers(0, 3) | st.integers(0, 3) | st.sampled_from([0, 1, 4, 5, 10**16 - 1])
_RANGES = st.tuples(_NUMBERS, _NUMBERS, _HASHES)
_KINDS = st.sampled_from(["sha256", "sha256", "sha256", "SHA256", "sha1", "md5", "none", ""])
_VERSIONS = st.sampled_from(["2.0", "2.0", "2.0", "2.0", "1.4", "1.0", "3.0", "2", "", "2.0.0"])
_HEADS = st.sampled_from(
    [
        '<?xml version="1.0" ?>\n',
        '<?xml version="1.0" ?>\n',
        '<?xml version="1.0" ?>\n',
        "",
        '<?xml version="1.0" encoding="utf-16"?>\n',
        '<?xml version="1.0" encoding="unknown-8"?>\n',
        '<!DOCTYPE bmap [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>\n',
        '<!DOCTYPE bmap [<!ENTITY x SYSTEM "file:///etc/passwd">]>\n',
        '<!DOCTYPE bmap SYSTEM "file:///etc/passwd">\n',
        "<!-- a comment -->\n" * 3,
        "\ufeff",
    ]
)


_Numbered = tuple[int, int, str | None]


def _in_order(ranges: Sequence[_Numbered]) -> list[_Numbered]:
    found: list[_Numbered] = []
    for a, b, digest in sorted(ranges, key=lambda each: min(each[:2])):
        if not found or min(a, b) > found[-1][1]:
            found.append((min(a, b), max(a, b), digest))
    return found


def _right_ranges(content: bytes, block: int) -> list[_Numbered]:
    starts = range(0, len(content), block) if block else ()
    return [(at // block, at // block, _RIGHT) for at in starts if any(content[at : at + block])]


def _count(ranges: Sequence[_Numbered]) -> int:
    return sum(max(0, last - first + 1) for first, last, _ in ranges)


def _range(content: bytes, block: int, first: int, last: int, digest: str | None) -> str:
    if digest == _RIGHT:
        digest = hashlib.sha256(content[first * block : (last + 1) * block]).hexdigest()
    attribute = "" if digest is None else f' chksum="{digest}"'
    text = str(first) if first == last else f"{first}-{last}"
    return f"        <Range{attribute}> {text} </Range>\n"


@st.composite
def block_maps(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of a map of a file with this content, right or wrong in some way."""
    size = draw(_SIZES) if draw(_ONE_IN_FOUR) else len(content)
    block = draw(_BLOCKS)
    ranges = draw(st.lists(_RANGES, max_size=4))
    if not draw(_ONE_IN_FOUR):
        ranges = _in_order(_right_ranges(content, block) + ranges)
    fields = {
        "ImageSize": str(size),
        "BlockSize": str(block),
        "BlocksCount": str(-(-size // block) if block else 0),
        "MappedBlocksCount": str(_count(ranges)),
        "ChecksumType": draw(_KINDS) if draw(_ONE_IN_FOUR) else "sha256",
        "BmapFileChecksum": _ZEROS,
        "BlockMap": "\n" + "".join(_range(content, block, *each) for each in ranges) + "    ",
    }
    if draw(_ONE_IN_FOUR):
        name = draw(st.sampled_from(sorted(fields)))
        replaced = draw(st.one_of(st.none(), _ODD_NUMBERS, st.sampled_from(["&a;", "&x;", "&b;"])))
        if replaced is None:
            del fields[name]
        else:
            fields[name] = replaced
    body = "".join(f"    <{name}> {text} </{name}>\n" for name, text in fields.items())
    head = draw(_HEADS) if draw(_ONE_IN_FOUR) else ""
    version = draw(_VERSIONS) if draw(_ONE_IN_FOUR) else "2.0"
    text = f'{head}<bmap version="{version}">\n{body}</bmap>\n'.encode()
    if not draw(_ONE_IN_FOUR):
        digest = hashlib.sha256(text).hexdigest().encode()
        text = text.replace(_ZEROS.encode(), digest, 1)
    return draw(mutated(text)) if draw(_ONE_IN_FOUR) else text


def mutated(text: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some of them cut, doubled or overwritten."""

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        data = bytearray(text)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(data)))
            until = draw(st.integers(at, min(at + 8, len(data))))
            data[at:until] = draw(st.binary(max_size=4) | st.just(bytes(data[at:until]) * 3))
        return bytes(data)

    return changed()
