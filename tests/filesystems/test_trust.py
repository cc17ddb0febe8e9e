"""Which file systems' extents are trusted, and what makes them untrusted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.errors import UntrustedExtentsError
from diffmergefs.core.layer import Layer
from diffmergefs.opening import trust
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy, grain, require_trust
from tests.support.images import PAGE, signed, write_layer
from tests.support.subjects.trust import MIB, SIZE, diff, refusal, require_overridable


def test_a_plain_diff_is_trusted(real_fs: Path) -> None:
    assert require_trust(diff(real_fs, 1, 7, 8, 100), TrustPolicy()) == []
    assert require_trust(diff(real_fs), TrustPolicy()) == []


def test_an_odd_end_of_the_file_counts_as_the_end_of_a_page(real_fs: Path) -> None:
    size = 2 * PAGE + 100
    layer = Layer.open(
        str(write_layer(real_fs / "diff", size, [(2 * PAGE, signed(1, 2 * PAGE, 100))]))
    )
    assert require_trust(layer, TrustPolicy()) == []


@pytest.mark.parametrize(("kind", "unit"), [("xfs16k", 16384), ("tmpfs_huge", 2 * MIB)])
def test_a_grain_coarser_than_the_page_is_refused(
    kind: str, unit: int, filesystem: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "untrusted_filesystem", lambda _: None)  # what comes before it
    layer = diff(filesystem(kind), 1)
    assert grain(layer.fd) == unit
    # The reason for the check: the written page's neighbours are data too.
    assert layer.extents.data_bytes == unit
    require_overridable(layer, "grain")
    assert str(unit) in str(refusal(layer)) and str(PAGE) in str(refusal(layer))


def test_a_guest_page_as_large_as_the_grain_is_trusted(filesystem: Callable[[str], Path]) -> None:
    layer = diff(filesystem("xfs16k"), 1)
    assert require_trust(layer, TrustPolicy(page_size=16384)) == []
    assert require_trust(layer, TrustPolicy(page_size=65536, trust_grain={"all"})) != []


def test_a_fine_grain_does_not_make_part_of_a_large_page_right(real_fs: Path) -> None:
    error = refusal(diff(real_fs, 4, 5), TrustPolicy(page_size=16384))
    assert error.check == "alignment"
    assert f"[{4 * PAGE}, {6 * PAGE})" in str(error) and "16384" in str(error)
    assert require_trust(diff(real_fs, 4, 5, 6, 7), TrustPolicy(page_size=16384)) == []


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_preallocated_range_is_refused_where_reading_turns_it_into_data(
    kind: str, filesystem: Callable[[str], Path]
) -> None:
    path = write_layer(filesystem(kind) / "diff", SIZE, [])
    subprocess.run(["fallocate", "-o", f"{MIB}", "-l", f"{MIB}", path], check=True)
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), signed(1, MIB, PAGE), MIB)
        os.fsync(file.fileno())
    subprocess.run(["cat", path], check=True, stdout=subprocess.DEVNULL)
    layer = Layer.open(str(path))
    # The reason for the check: one page was written, the filesystem says more.
    assert layer.extents.data_bytes > PAGE
    require_overridable(layer, "unwritten")
    # Nothing else would have told.
    assert layer.extents.data_bytes <= os.fstat(layer.fd).st_blocks * 512


def test_compression_does_not_make_data_look_like_holes(filesystem: Callable[[str], Path]) -> None:
    directory = filesystem("btrfs")
    os.setxattr(directory, "btrfs.compression", b"zstd")
    path = write_layer(directory / "diff", SIZE, [(MIB, bytes(MIB)), (8 * MIB, bytes(PAGE))])
    flags = subprocess.run(["filefrag", "-v", path], check=True, capture_output=True, text=True)
    assert "encoded" in flags.stdout
    layer = Layer.open(str(path))
    assert list(layer.extents) == [(MIB, 2 * MIB), (8 * MIB, 8 * MIB + PAGE)]
    assert require_trust(layer, TrustPolicy()) == []


def test_a_complete_image_needs_no_grain_but_must_not_be_preallocated(
    filesystem: Callable[[str], Path],
) -> None:
    path = write_layer(filesystem("xfs16k") / "full", MIB, [(0, signed(1, 0, MIB))])
    layer = Layer.open(str(path))
    assert require_trust(layer, TrustPolicy(), complete=True) == []
    assert refusal(layer).check == "grain"

    path = write_layer(filesystem("ext4") / "full", MIB, [])
    subprocess.run(["fallocate", "-l", f"{MIB}", path], check=True)
    with pytest.raises(UntrustedExtentsError) as caught:
        require_trust(Layer.open(str(path)), TrustPolicy(), complete=True)
    assert caught.value.check == "unwritten"


@pytest.mark.parametrize("kind", ["xfs16k", "tmpfs_huge", "ext4"])
def test_none_of_it_is_asked_of_a_base(kind: str, filesystem: Callable[[str], Path]) -> None:
    path = write_layer(filesystem(kind) / "base", SIZE, [(PAGE, signed(0, PAGE, PAGE))])
    if kind == "ext4":
        subprocess.run(["fallocate", "-o", f"{MIB}", "-l", f"{MIB}", path], check=True)
    image = open_chain(path)
    assert image.overridden == []
    assert image.view.read(0, 3 * PAGE) == bytes(PAGE) + signed(0, PAGE, PAGE) + bytes(PAGE)


def test_what_was_overridden_is_told_with_the_image(filesystem: Callable[[str], Path]) -> None:
    directory = filesystem("xfs16k")
    base = write_layer(directory / "base", SIZE, [])
    one = write_layer(directory / "one", SIZE, [(0, b"x")])
    with pytest.raises(UntrustedExtentsError):
        open_chain(base, [one])
    (line,) = open_chain(base, [one], TrustPolicy(trust_grain={"all"})).overridden
    assert str(one) in line and "grain" in line
