"""Diffs whose holes look filled: the hint, and what it reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.core.errors import UntrustedExtentsError
from diffmergefs.core.layer import Layer
from diffmergefs.writing.sealing import seal_layer
from tests.support.commands import diffmergefs
from tests.support.images import PAGE, write_layer
from tests.support.stores import pages
from tests.support.subjects.filled import (
    MIB,
    SIZE,
    Extents,
    base_in,
    filled_store,
    folio,
    hints,
    zeros,
)

SMALL = [folio(first, 4, 1) for first in (8, 40, 72)]


HEALTHY: dict[str, Extents] = {
    "nothing": [],
    "one aligned extent": pages(1, range(16, 32)),
    "one aligned extent of zeros": [zeros(16, 16)],
    "a kernel stack": folio(16, 4, 3),
    "two of them": [*SMALL[0], *SMALL[1]],
    "a page of it wiped": [*pages(1, range(64, 128)), zeros(70, 1)],
    "large, half wiped": [*pages(1, range(128, 192)), zeros(192, 64)],
    "a wiped block beside a written one": [zeros(256, 256), *pages(1, range(512, 544))],
    "not in its place": folio(30, 64, 5),
    "many wiped, of any shape": [zeros(64 * n + n % 4, 4 + n % 3) for n in range(60)],
    "small ones, as many of other shapes": [
        *(extent for small in SMALL for extent in small),
        *(extent for n in range(4) for extent in folio(1001 + 16 * n, 5, 1)),
    ],
}


FILLED: dict[str, Extents] = {
    "one store in a large folio": folio(64, 64, 5),
    "at the end of the file": folio(SIZE // PAGE - 64, 64, 63),
    "beside healthy pages": [*folio(512, 512, 5), *pages(1, range(2001, 4000, 2))],
    "three small folios": [extent for small in SMALL for extent in small],
    "written through a mapping": [
        extent for n in range(10) for extent in folio(64 * n, 16, *range(12))
    ],
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_a_guest_may_write_gives_no_hint(tmp_path: Path, name: str) -> None:
    diff = write_layer(tmp_path / "diff", SIZE, HEALTHY[name])
    assert hints(base_in(tmp_path), diff, strict=True) == []


@pytest.mark.parametrize("name", FILLED)
def test_what_looks_filled_gives_one(tmp_path: Path, name: str) -> None:
    diff = write_layer(tmp_path / "diff", SIZE, FILLED[name])
    (hint,) = hints(base_in(tmp_path), diff)
    with pytest.raises(UntrustedExtentsError, match="--strict") as caught:
        hints(tmp_path / "base", diff, strict=True)
    assert caught.value.check == "filled" and str(caught.value).startswith(hint.split("; ")[0])
    assert caught.value.remedy.startswith("take the diff again")


def test_the_numbers_of_a_hint(tmp_path: Path) -> None:
    diff = write_layer(tmp_path / "diff", SIZE, folio(64, 64, 5) + folio(512, 512, 1, 2))
    assert hints(base_in(tmp_path), diff) == [
        f"{diff}: looks as if holes were filled: {63 + 510} zero pages in 2 aligned extents at"
        " 0x40000...; harmless if the guest wiped or freed them"
    ]


def test_the_parents_view_counts(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    diff = write_layer(tmp_path / "diff", SIZE, folio(64, 64, 5))
    wiped = write_layer(tmp_path / "wiped", SIZE, [zeros(30, 120)])
    assert len(hints(base, diff)) == 1
    # Over zeros of the parent, zeros hide nothing.
    assert hints(base, wiped, diff) == []


def test_larger_guest_pages_have_larger_folios(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    # Whole pages of 16 KiB, each with 4 KiB of data: in their place, but no folio fills less.
    diff = write_layer(tmp_path / "diff", SIZE, [e for n in range(50) for e in folio(8 * n, 4, 1)])
    assert len(hints(base, diff)) == 1
    assert hints(base, diff, page_size=16384) == []


def test_a_record_says_what_the_guest_wrote(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    diff = write_layer(tmp_path / "diff", SIZE, folio(64, 64, 5))
    seal_layer(diff)
    assert hints(base, diff, strict=True) == []
    assert len(hints(base, diff, no_seal=True)) == 1


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What layers are read: the name of each one's file, and how many bytes."""
    found: list[tuple[str, int]] = []
    real = Layer.read_into

    def counted(self: Layer, buffer: memoryview, offset: int, *, nowait: bool = False) -> None:
        found.append((os.path.basename(self.path), len(buffer)))
        real(self, buffer, offset, nowait=nowait)

    monkeypatch.setattr(Layer, "read_into", counted)
    return found


def test_without_an_extent_of_that_shape_nothing_is_read(
    tmp_path: Path, reads: list[tuple[str, int]]
) -> None:
    diff = write_layer(tmp_path / "diff", SIZE, [zeros(64 * n + 1, 4) for n in range(60)])
    assert hints(base_in(tmp_path), diff) == []
    assert reads == []


@pytest.mark.parametrize("stride", [16, 600])
def test_reading_is_bounded_and_an_extent_is_read_in_one_go(
    tmp_path: Path, reads: list[tuple[str, int]], stride: int
) -> None:
    size = 256 * MIB
    count = size // PAGE // stride
    base = write_layer(tmp_path / "base", size, [(0, b"x" * size)])
    held = [zeros(n * stride, stride - 4) for n in range(count)]
    diff = write_layer(tmp_path / "diff", size, held)
    hints(base, diff)
    ours = [length for name, length in reads if name == "diff"]
    assert sum(ours) == 8 * MIB
    # In the pieces that lie as folios do; [0, 12) is [0, 8) and [8, 12).
    assert len(ours) <= sum(ours) // (4 * PAGE)


def test_it_is_looked_for_once(tmp_path: Path, reads: list[tuple[str, int]]) -> None:
    store = tmp_path / "store"
    filled_store(store, 3)
    policy = f"--state-dir={tmp_path / 'state'}"
    first = diffmergefs("list", policy, store)
    assert first.stderr.count("looks as if holes were filled") == 3
    assert diffmergefs("list", policy, store).stderr == first.stderr
