"""superserve's snapshots, made by hand from the format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.support.images import PAGE, write_layer
from tests.support.stores import BASE_PAGES, SIZE, age, pages

_POLYNOMIAL = 0xAD93D23594C935A9
_BITS = 64


def crc64(data: bytes) -> int:
    """The CRC-64 of the format, bit by bit as a division: another way than the program's."""
    rest = 0
    for byte in data:
        for n in range(8):
            carry = rest >> 63 ^ (byte >> n & 1)
            rest = rest << 1 & (1 << _BITS) - 1 ^ (_POLYNOMIAL if carry else 0)
    return int(f"{rest:064b}"[::-1], 2)


def presence(
    numbers: Iterable[int], count: int = SIZE // PAGE, page: int = PAGE, magic: bytes = b"FCPRSNC1"
) -> bytes:
    """A presence file: `count` pages of `page` bytes, of which these are present."""
    words = [0] * -(-count // _BITS)
    for number in numbers:
        words[number // _BITS] |= 1 << number % _BITS
    body = magic + b"".join(n.to_bytes(8, "little") for n in (page, count, *words))
    return body + crc64(body).to_bytes(8, "little")


def write_template(store: Path, name: str = "templates/python", *, layer: int = 0) -> Path:
    """A template's directory with its `mem.snap` and `vmstate.snap`; the image's path."""
    folder = store / name
    folder.mkdir(parents=True)
    memory = write_layer(folder / "mem.snap", SIZE, pages(layer, BASE_PAGES))
    (folder / "vmstate.snap").write_bytes(b"state of the template")
    age(memory, folder / "vmstate.snap")
    return memory


def write_sandbox(
    store: Path, name: str, base: Path | str, *, layer: int = 1, numbers: Iterable[int] = (1,)
) -> Path:
    """A sandbox's directory with a `mem.diff` of these pages over `base`; the diff's path."""
    folder = store / name
    folder.mkdir(parents=True)
    held = list(numbers)
    diff = write_layer(folder / "mem.diff", SIZE, pages(layer, held))
    Path(f"{diff}.base").write_text(str(base))
    Path(f"{diff}.presence").write_bytes(presence(held))
    (folder / "vmstate.snap").write_bytes(b"state of the sandbox")
    age(diff, Path(f"{diff}.base"), Path(f"{diff}.presence"), folder / "vmstate.snap")
    return diff
