"""Law 4: where a diff's extents are trusted, on the filesystems that give the reasons."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.errors import DenseDiffError, SizeMismatchError, UntrustedExtentsError
from diffmergefs.core.extents import Extent
from diffmergefs.core.layer import Layer
from diffmergefs.opening import trust
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy, grain, override_lines, require_trust
from tests.support.images import PAGE, signed, write_layer

MIB = 1 << 20
SIZE = 16 * MIB


def diff(directory: Path, *pages: int, size: int = SIZE) -> Layer:
    extents = [(n * PAGE, signed(1, n * PAGE, PAGE)) for n in pages]
    return Layer.open(str(write_layer(directory / "diff", size, extents)))


def refusal(layer: Layer, policy: TrustPolicy | None = None) -> UntrustedExtentsError:
    with pytest.raises(UntrustedExtentsError) as caught:
        require_trust(layer, policy or TrustPolicy())
    error = caught.value
    assert str(error).startswith(f"{layer.path}: ") and "\n" not in str(error)
    return error


def require_overridable(layer: Layer, check: str) -> None:
    """The check refuses the layer, --trust-grain overrides it, and a line says so."""
    error = refusal(layer)
    assert error.check == check
    assert f"--trust-grain={check} " in str(error)
    for names in ({"all"}, {check}):
        found = require_trust(layer, TrustPolicy(trust_grain=names))
        assert override_lines(found) == [f"--trust-grain overrides the check of {check}: {error}"]


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


@pytest.mark.parametrize(
    "extent", [(PAGE + 512, 2 * PAGE), (PAGE, 2 * PAGE - 512), (PAGE, 9 * PAGE + 1)]
)
def test_unaligned_extents_are_refused(
    extent: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "data_extents", lambda *_: iter([Extent(*extent)]))
    monkeypatch.setattr(sparse, "_fiemap", lambda *_: None)
    layer = diff(tmp_path, *range(1, 12))
    require_overridable(layer, "alignment")
    assert f"[{extent[0]}, {extent[1]})" in str(refusal(layer))


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


@pytest.fixture
def all_is_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A filesystem without lseek, as FUSE's default: each file is one extent."""
    monkeypatch.setattr(sparse, "data_extents", lambda _, size: iter([Extent(0, size)]))
    yield


@pytest.mark.usefixtures("all_is_data")
def test_more_data_than_blocks_is_refused_and_nothing_overrides_it(tmp_path: Path) -> None:
    layer = diff(tmp_path, 1)
    for complete in (False, True):
        for policy in (TrustPolicy(), TrustPolicy(trust_grain={"all"}, dense=True)):
            with pytest.raises(UntrustedExtentsError) as caught:
                require_trust(layer, policy, complete=complete)
            assert caught.value.check == "blocks"
            assert f"{SIZE} bytes" in str(caught.value) and f"only {PAGE}" in str(caught.value)
            assert "--trust-grain" not in str(caught.value)


def test_compression_does_not_make_data_look_like_holes(filesystem: Callable[[str], Path]) -> None:
    directory = filesystem("btrfs")
    os.setxattr(directory, "btrfs.compression", b"zstd")
    path = write_layer(directory / "diff", SIZE, [(MIB, bytes(MIB)), (8 * MIB, bytes(PAGE))])
    flags = subprocess.run(["filefrag", "-v", path], check=True, capture_output=True, text=True)
    assert "encoded" in flags.stdout
    layer = Layer.open(str(path))
    assert list(layer.extents) == [(MIB, 2 * MIB), (8 * MIB, 8 * MIB + PAGE)]
    assert require_trust(layer, TrustPolicy()) == []


def test_several_failed_checks_are_overridden_with_a_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = diff(tmp_path, 1)
    monkeypatch.setattr(trust, "untrusted_filesystem", lambda _: "it is on exoticfs")
    first, second = require_trust(layer, TrustPolicy(page_size=2048, trust_grain={"all"}))
    assert "check of filesystem: " in first.override and "check of grain: " in second.override


def test_vouching_for_one_check_lets_no_other_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = diff(tmp_path, 1)
    monkeypatch.setattr(trust, "untrusted_filesystem", lambda _: "it is on exoticfs")
    assert len(require_trust(layer, TrustPolicy(trust_grain={"filesystem"}))) == 1
    assert refusal(layer, TrustPolicy(trust_grain={"copy-up", "grain"})).check == "filesystem"
    coarse = TrustPolicy(page_size=2048, trust_grain=["filesystem", "unwritten"])
    assert refusal(layer, coarse).check == "grain"


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


def test_trust_grain_overrides_neither_size_nor_density(tmp_path: Path) -> None:
    policy = TrustPolicy(trust_grain={"all"})
    base = write_layer(tmp_path / "base", 4 * PAGE, [])
    other = write_layer(tmp_path / "other", 5 * PAGE, [])
    full = write_layer(tmp_path / "full", 4 * PAGE, [(0, signed(1, 0, 4 * PAGE))])
    with pytest.raises(SizeMismatchError):
        open_chain(base, [other], policy)
    with pytest.raises(DenseDiffError):
        open_chain(base, [full], policy)


@pytest.mark.parametrize("kind", ["xfs16k", "tmpfs_huge", "ext4"])
def test_none_of_it_is_asked_of_a_base(kind: str, filesystem: Callable[[str], Path]) -> None:
    path = write_layer(filesystem(kind) / "base", SIZE, [(PAGE, signed(0, PAGE, PAGE))])
    if kind == "ext4":
        subprocess.run(["fallocate", "-o", f"{MIB}", "-l", f"{MIB}", path], check=True)
    image = open_chain(path)
    assert image.overridden == []
    assert image.view.read(0, 3 * PAGE) == bytes(PAGE) + signed(0, PAGE, PAGE) + bytes(PAGE)


@pytest.mark.usefixtures("all_is_data")
def test_a_base_whose_filesystem_reports_no_holes_reads_right(tmp_path: Path) -> None:
    path = write_layer(tmp_path / "base", SIZE, [(PAGE, signed(0, PAGE, PAGE))])
    assert open_chain(path).view.read(0, 2 * PAGE) == bytes(PAGE) + signed(0, PAGE, PAGE)


def test_what_was_overridden_is_told_with_the_image(filesystem: Callable[[str], Path]) -> None:
    directory = filesystem("xfs16k")
    base = write_layer(directory / "base", SIZE, [])
    one = write_layer(directory / "one", SIZE, [(0, b"x")])
    with pytest.raises(UntrustedExtentsError):
        open_chain(base, [one])
    (line,) = open_chain(base, [one], TrustPolicy(trust_grain={"all"})).overridden
    assert str(one) in line and "grain" in line


def test_all_stands_for_every_check() -> None:
    assert TrustPolicy().trust_grain == frozenset()
    assert TrustPolicy(trust_grain=["all"]).trust_grain == frozenset(trust.CHECKS)
    assert TrustPolicy(trust_grain=["grain"]).trust_grain == {"grain"}


@pytest.mark.parametrize("wrong", ["grain", True, {"grain", "blocks"}, [""]])
def test_names_of_no_check_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"trust_grain is|is no check; they are filesystem, "):
        TrustPolicy(trust_grain=wrong)


@pytest.mark.parametrize("wrong", [{"page_size": 0}, {"page_size": 3000}, {"verify": "yes"}])
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        TrustPolicy(**wrong)
