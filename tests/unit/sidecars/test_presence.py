"""A diff's presence file says what is data, whatever a copy did to the holes; or it is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs import apply_diff, flatten, open_chain, seal_layer
from diffmergefs.analysis.info import describe
from diffmergefs.checks.doctor import examine_path
from diffmergefs.core.errors import (
    DenseDiffError,
    FileAccessError,
    PresenceError,
    SealError,
    UntrustedExtentsError,
)
from diffmergefs.core.layer import Layer
from diffmergefs.fuse.served import Store
from diffmergefs.opening.images import Image
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars import presence
from diffmergefs.sidecars.presence import PRESENCE_SUFFIX
from diffmergefs.sidecars.seal import Stored
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.stores import BASE_PAGES, SIZE, age, pages, write_chain, write_numbered
from tests.support.superserve import crc64
from tests.support.superserve import presence as bits

BELOW = pages(0, range(16))
# Pages 1 and 9 are written, page 5 is written with zeros.
HELD = (1, 5, 9)
DIFF = [*pages(1, [1, 9]), (5 * PAGE, bytes(PAGE))]
IMAGE = overlay_oracle(SIZE, [BELOW, DIFF])


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path]:
    base = write_layer(tmp_path / "mem.snap", SIZE, BELOW)
    diff = write_layer(tmp_path / "mem.diff", SIZE, DIFF)
    beside(diff).write_bytes(bits(HELD))
    return base, diff


def beside(diff: Path) -> Path:
    return Path(f"{diff}.presence")


def opened(base: Path, diff: Path, **policy: object) -> Image:
    return open_chain(base, [diff], TrustPolicy(**policy))  # type: ignore[arg-type]


def shown(base: Path, diff: Path, **policy: object) -> bytes:
    with opened(base, diff, **policy).view as view:
        return bytes(view.read(0, view.size))


def test_the_extents_are_those_of_the_bitmap(chain: tuple[Path, Path]) -> None:
    with opened(*chain).view as view:
        base, layer = view.layers
        assert list(layer.extents) == [(n * PAGE, (n + 1) * PAGE) for n in HELD]
        (record,) = layer.records
        assert record.suffix == PRESENCE_SUFFIX and record.path == f"{chain[1]}.presence"
        assert (record.block, record.unchecked) == (PAGE, 0)
        assert base.records == ()
        assert view.read(0, SIZE) == IMAGE


def test_a_copy_without_holes_shows_the_same(chain: tuple[Path, Path]) -> None:
    base, diff = chain
    diff.write_bytes(diff.read_bytes())
    assert shown(base, diff) == IMAGE
    beside(diff).unlink()
    with pytest.raises(DenseDiffError):
        shown(base, diff)


def test_a_copy_that_lost_its_written_zeros_shows_the_same(chain: tuple[Path, Path]) -> None:
    base, diff = chain
    write_layer(diff, SIZE, pages(1, [1, 9]))
    assert shown(base, diff) == IMAGE
    beside(diff).unlink()
    assert shown(base, diff) == overlay_oracle(SIZE, [BELOW, pages(1, [1, 9])]) != IMAGE


def test_a_page_that_is_marked_is_data_though_a_hole_stands_there(tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, BELOW)
    diff = write_layer(tmp_path / "any.name", SIZE, [])
    beside(diff).write_bytes(bits([3]))
    assert shown(base, diff) == overlay_oracle(SIZE, [BELOW, [(3 * PAGE, bytes(PAGE))]])


def test_the_last_page_may_reach_beyond_the_end(tmp_path: Path) -> None:
    size = 3 * PAGE + 100
    base = write_layer(tmp_path / "base", size, [(0, signed(0, 0, size))])
    diff = write_layer(tmp_path / "diff", size, [(3 * PAGE, signed(1, 3 * PAGE, 100))])
    beside(diff).write_bytes(bits([3], 4))
    with opened(base, diff).view as view:
        assert list(view.layers[1].extents) == [(3 * PAGE, size)]
        assert view.read(0, size) == signed(0, 0, 3 * PAGE) + signed(1, 3 * PAGE, 100)


@pytest.mark.parametrize("count", [15, 17, 1, 64])
def test_a_bitmap_of_another_size_is_refused(chain: tuple[Path, Path], count: int) -> None:
    base, diff = chain
    beside(diff).write_bytes(bits([0], count))
    with pytest.raises(PresenceError, match=f"for {count} pages of 4096 bytes.*{SIZE} bytes.* 16"):
        shown(base, diff)


@pytest.mark.parametrize("data", [b"", b"\x55", bits(HELD)[:-1], b"x" * 40])
def test_what_is_malformed_is_refused_and_names_the_file(
    chain: tuple[Path, Path], data: bytes
) -> None:
    base, diff = chain
    beside(diff).write_bytes(data)
    for call in (lambda: shown(base, diff), lambda: apply_diff(diff, base)):
        with pytest.raises(PresenceError, match=f"^{diff}.presence: "):
            call()
    assert base.read_bytes() == overlay_oracle(SIZE, [BELOW])


def test_one_that_is_too_large_is_refused_unread(chain: tuple[Path, Path]) -> None:
    base, diff = chain
    os.truncate(beside(diff), (64 << 20) + 1)
    with pytest.raises(PresenceError, match="67108865 bytes, a presence file has at most 67108864"):
        shown(base, diff)


def test_a_directory_or_a_fifo_in_its_place_is_refused(chain: tuple[Path, Path]) -> None:
    base, diff = chain
    beside(diff).unlink()
    os.mkfifo(beside(diff))
    with pytest.raises(FileAccessError, match="a FIFO, not a regular file"):
        shown(base, diff)


def test_bytes_that_it_leaves_out_must_be_zeros(chain: tuple[Path, Path]) -> None:
    base, diff = chain
    beside(diff).write_bytes(bits([1, 5]))  # of an earlier save: page 9 was written since
    absent = rf"marks bytes \[{9 * PAGE}, {10 * PAGE}\) of .* as absent"
    with pytest.raises(PresenceError, match=absent):
        shown(base, diff)
    assert shown(base, diff, verify="no") == overlay_oracle(SIZE, [BELOW, DIFF[0:1], DIFF[2:]])


def test_it_is_compared_once_and_remembered(
    chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    real = presence.compare

    def counted(layer: Layer, found: Stored[presence.Presence]) -> None:
        compared.append(found.path)
        real(layer, found)

    monkeypatch.setattr(presence, "compare", counted)
    base, diff = chain
    for path in (diff, beside(diff)):
        os.utime(path, ns=(1, 1))
    monkeypatch.setattr("diffmergefs.sidecars.verified.Identity.is_final", lambda self, since: True)
    runs = [("pins", 1), ("pins", 0), ("full", 1), ("no", 0), ("pins", 0)]
    for verify, expected in runs:
        compared.clear()
        assert shown(base, diff, verify=verify, state_dir=str(tmp_path / "state")) == IMAGE
        assert len(compared) == expected, verify
    beside(diff).write_bytes(bits([1, 5, 9, 10]))
    shown(base, diff, state_dir=str(tmp_path / "state"))
    assert len(compared) == 1  # another bitmap


def test_a_bases_is_not_looked_at(chain: tuple[Path, Path]) -> None:
    base, diff = chain
    beside(base).write_bytes(b"")
    assert shown(base, diff) == IMAGE


def test_pages_larger_than_the_guests_are_a_coarse_grain(tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, BELOW)
    diff = write_layer(tmp_path / "diff", SIZE, pages(1, range(4)))
    beside(diff).write_bytes(bits([0], 4, 4 * PAGE))
    with pytest.raises(UntrustedExtentsError, match="presence was made in blocks of 16384 bytes"):
        shown(base, diff)
    expected = overlay_oracle(SIZE, [BELOW, pages(1, range(4))])
    assert shown(base, diff, page_size=4 * PAGE) == expected
    seal_layer(diff, policy=TrustPolicy(trust_grain={"all"}))  # a finer seal makes it no finer
    with pytest.raises(UntrustedExtentsError, match="presence was made in blocks of 16384 bytes"):
        shown(base, diff)


def test_one_that_marks_every_page_is_dense(tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, BELOW)
    diff = write_layer(tmp_path / "diff", SIZE, pages(1, range(16)))
    beside(diff).write_bytes(bits(range(16)))
    with pytest.raises(DenseDiffError):
        shown(base, diff)
    assert shown(base, diff, dense=True) == overlay_oracle(SIZE, [pages(1, range(16))])


def test_a_symlink_has_it_beside_it_or_beside_its_file(
    chain: tuple[Path, Path], tmp_path: Path
) -> None:
    base, diff = chain
    diff.write_bytes(diff.read_bytes())
    link = tmp_path / "link"
    link.symlink_to(diff)
    assert shown(base, link) == IMAGE
    Path(f"{link}.presence").write_bytes(b"")
    with pytest.raises(PresenceError, match=r"link\.presence: is empty"):
        shown(base, link)


def test_a_seal_beside_it_must_say_the_same(chain: tuple[Path, Path]) -> None:
    base, diff = chain
    result = seal_layer(diff)  # by the bitmap, not by the holes
    assert result.data_bytes == 3 * PAGE
    with opened(base, diff).view as view:
        assert [record.suffix for record in view.layers[1].records] == [".bmap", ".presence"]
    os.truncate(diff, 0)
    write_layer(diff, SIZE, DIFF)
    beside(diff).write_bytes(bits([1, 5, 9, 12]))
    with pytest.raises(SealError, match=r"disagrees with .*mem\.diff\.presence"):
        shown(base, diff)
    shown(base, diff, no_seal=True)


def test_no_seal_does_not_ignore_it(chain: tuple[Path, Path]) -> None:
    base, diff = chain
    beside(diff).write_bytes(b"")
    with pytest.raises(PresenceError):
        shown(base, diff, no_seal=True)


def test_apply_copies_what_it_marks(chain: tuple[Path, Path]) -> None:
    base, diff = chain
    diff.write_bytes(diff.read_bytes())
    beside(base).write_bytes(b"left over")
    assert apply_diff(diff, base, force={"sealed"}) == 3 * PAGE
    assert base.read_bytes() == IMAGE
    assert not beside(base).exists() and beside(diff).exists()


@pytest.mark.parametrize("seal", [False, True])
def test_what_writes_a_file_takes_its_presence_away(
    chain: tuple[Path, Path], tmp_path: Path, seal: bool
) -> None:
    beside(tmp_path / "out").write_bytes(b"left over")
    with opened(*chain).view as view:
        flatten(view, tmp_path / "out", seal=seal)
    assert not beside(tmp_path / "out").exists()
    assert (tmp_path / "out").read_bytes() == IMAGE


def test_a_diff_of_any_layout_goes_by_it(tmp_path: Path) -> None:
    write_numbered(tmp_path / "numbered", ["000-base.mem", "001-work.mem"])
    write_chain(tmp_path / "forkd", ["base", "work"])
    for root, diff in (
        (tmp_path / "numbered", tmp_path / "numbered" / "001-work.mem"),
        (tmp_path / "forkd", tmp_path / "forkd" / "work" / "memory.bin"),
    ):
        write_layer(diff, SIZE, DIFF)
        diff.write_bytes(diff.read_bytes())
        beside(diff).write_bytes(bits(HELD))
        age(diff, beside(diff))
        store = Store(str(root), TrustPolicy(), clock=lambda: 1 << 62)
        store.look()
        first = store.open("work")
        image = overlay_oracle(SIZE, [pages(0, BASE_PAGES), DIFF])
        assert first.view.read(0, SIZE) == image
        beside(diff).write_bytes(bits([1, 5, 9, 15]))  # another record is another image
        store.look()
        again = store.open("work")
        assert again is not first and again.view.read(15 * PAGE, PAGE) == bytes(PAGE)
        beside(diff).write_bytes(b"")
        store.look()
        with pytest.raises(PresenceError, match="the save was interrupted"):
            store.open("work")
        store.close()


def test_info_calls_it_recorded(chain: tuple[Path, Path]) -> None:
    image = opened(*chain)
    with image.view:
        assert [layer.trust for layer in describe(image).layers] == ["base", "recorded"]
        assert describe(image).layers[1].grain == PAGE


def test_doctor_goes_by_it(tmp_path: Path) -> None:
    diff = write_layer(tmp_path / "any.name", SIZE, DIFF)
    diff.write_bytes(diff.read_bytes())
    beside(diff).write_bytes(bits(HELD))
    found = {finding.check: finding for finding in examine_path(str(diff))}
    assert "no-seal" not in found and "dense" not in found
    assert "12288 bytes in 3 extents can be trusted" in found["extents"].finding
    beside(diff).write_bytes(b"")
    found = {finding.check: finding for finding in examine_path(str(diff))}
    assert found["access"].severity == "wrong" and "interrupted" in found["access"].finding


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"123456789", 0xE9C6D914C4B8D9CA), (b"FCPRSNC1", 0x9FEE52A36DD3C749), (b"", 0)],
)
def test_the_check_values_of_the_checksum(data: bytes, expected: int) -> None:
    assert presence.crc64(data) == expected == crc64(data)


@given(st.binary(max_size=100))
@settings(max_examples=50, deadline=None)
def test_any_checksum_is_that_of_the_long_division(data: bytes) -> None:
    assert presence.crc64(data) == crc64(data)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
@settings(max_examples=100, deadline=None)
def test_the_extents_are_the_runs_of_present_pages(drawn: tuple[int, set[int]]) -> None:
    count, numbers = drawn
    found = presence.parse(bits(numbers, count, 512))
    assert (found.page, found.pages) == (512, count)
    held = {n for start, stop in found.extents for n in range(start // 512, stop // 512)}
    assert held == numbers
    assert all(start % 512 == stop % 512 == 0 for start, stop in found.extents)
    runs = [n for n in numbers if n - 1 not in numbers]
    assert len(found.extents) == len(runs)  # joined across words


def test_bit_n_of_word_m_is_page_64_m_plus_n() -> None:
    text = bits([0, 63, 64, 65, 127, 130], 131)
    words = [int.from_bytes(text[n : n + 8], "little") for n in (24, 32, 40)]
    assert words == [1 | 1 << 63, 1 | 2 | 1 << 63, 4]
    starts = [start // PAGE for start, _ in presence.parse(text).extents]
    assert starts == [0, 63, 127, 130]


def test_no_page_and_all_pages() -> None:
    assert list(presence.parse(bits([], 70)).extents) == []
    assert list(presence.parse(bits(range(70), 70)).extents) == [(0, 70 * PAGE)]


GOOD = bits([1, 2], 16)


def with_checksum(body: bytes) -> bytes:
    return body + crc64(body).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty (0 bytes): the save was interrupted"),
        (b"\x55", "is the single byte 0x55: the save could not derive which pages are present"),
        (b"\x56", "1 bytes are too few"),
        (GOOD[:39], "39 bytes"),
        (GOOD + b"\0", "41 bytes, but 16 pages take 40"),
        (GOOD[:-8], "32 bytes, but 16 pages take 40"),
        (bits([1], 16, magic=b"FCPRSNC2"), "it begins with b'FCPRSNC2', not with b'FCPRSNC1'"),
        (GOOD[:24] + b"\7" + GOOD[25:], "its CRC-64 is 0x"),
        (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "it records 0x"),
        (bits([1], 16, page=0), "pages of 0 bytes: not a power of two"),
        (bits([1], 16, page=256), "pages of 256 bytes"),
        (bits([1], 16, page=4097), "pages of 4097 bytes"),
        (bits([1], 16, page=1 << 62), "are more than a file can have"),
        (with_checksum(GOOD[:16] + (1 << 63).to_bytes(8, "little")), "32 bytes, but"),
        (with_checksum(GOOD[:24] + (1 << 16).to_bytes(8, "little")), "beyond the last of 16"),
        (with_checksum(GOOD[:24] + b"\xff" * 8), "beyond the last of 16"),
        # Where a page begins there is more than 64 bits hold.
        (with_checksum(bits([], 1, 1 << 62)[:24] + b"\xff" * 8), "beyond the last of 1 "),
    ],
)
def test_what_is_malformed_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(PresenceError) as caught:
        presence.parse(data, "there/mem.diff.presence")
    text = str(caught.value)
    assert reason in text and text.startswith("there/mem.diff.presence: ")
    assert len(text.splitlines()) == 1
