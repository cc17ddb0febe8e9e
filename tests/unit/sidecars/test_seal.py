"""Layers with a seal beside them: its extents, once they were compared with the bytes."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from diffmergefs.analysis.info import describe
from diffmergefs.core.errors import (
    DenseDiffError,
    FileAccessError,
    LayerChangedError,
    SealError,
    UntrustedExtentsError,
)
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.identity import FileKey
from diffmergefs.core.layer import Layer
from diffmergefs.opening.images import open_chain, open_image
from diffmergefs.opening.opener import Opener
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars import bmap, seal
from diffmergefs.sidecars.verified import Identity, Remembered
from diffmergefs.writing.sealing import seal_layer
from tests.support.images import PAGE, signed, write_layer
from tests.support.stores import age, write_numbered, write_tag
from tests.support.subjects.seal import (
    BASE,
    DIFF,
    EXTENTS,
    ORACLE,
    SIZE,
    bmaptool,
    diff,
    filled,
    opened,
    poke,
)

__all__ = ["diff"]

NO_SEAL = TrustPolicy(no_seal=True)


def edit(path: Path, old: str, new: str) -> None:
    """Change the text of a seal, and make its own checksum right again."""
    text = path.read_text()
    assert old in text
    own = text.split("<BmapFileChecksum> ")[1][:64]
    text = text.replace(old, new).replace(own, "0" * 64)
    path.write_bytes(resealed(text.encode()))


def resealed(text: bytes) -> bytes:
    return text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1)


def test_the_extents_are_those_of_the_seal(diff: Path) -> None:
    layer = opened(diff)
    assert list(layer.walked) == [(0, SIZE)]
    assert list(layer.extents) == EXTENTS
    (record,) = layer.records
    assert (record.path, record.block, record.unchecked) == (f"{diff}.bmap", PAGE, 0)
    assert layer.record(".bmap") is record and layer.record(".presence") is None
    layer.check_unchanged()


def test_a_layer_without_a_seal_is_as_it_is_walked(tmp_path: Path) -> None:
    layer = opened(write_layer(tmp_path / "diff", SIZE, DIFF))
    assert list(layer.extents) == EXTENTS and layer.extents is layer.walked and layer.records == ()


def test_no_seal_ignores_it(diff: Path, tmp_path: Path) -> None:
    assert list(opened(diff, no_seal=True).extents) == [(0, SIZE)]
    base = write_layer(tmp_path / "base", SIZE, BASE)
    with pytest.raises(DenseDiffError):
        open_chain(base, [diff], NO_SEAL)
    Path(f"{diff}.bmap").write_bytes(b"nonsense")
    assert list(opened(diff, no_seal=True).extents) == [(0, SIZE)]


def test_the_name_may_be_too_long_for_a_seal(tmp_path: Path) -> None:
    path = write_layer(tmp_path / ("d" * 252), SIZE, DIFF)
    assert opened(path).records == ()
    store = tmp_path / "store"
    write_tag(store, "base", memory="m" * 255)
    assert open_image(store / "base").view.size == SIZE


# Comparing


@pytest.mark.parametrize("verify", ["pins", "full"])
@pytest.mark.parametrize("offset", [2 * PAGE, 3 * PAGE - 1, 6 * PAGE])
def test_another_byte_within_a_range_is_a_stale_seal(diff: Path, verify: str, offset: int) -> None:
    poke(diff, offset, b"!")
    with pytest.raises(SealError, match=r"a stale seal: the sha256 of bytes \[") as caught:
        opened(diff, verify=verify)
    start, stop = next(e for e in EXTENTS if e[0] <= offset < e[1])
    said = str(caught.value)
    assert said.startswith(f"{diff}.bmap: ") and f"[{start}, {stop}) of {diff} is " in said
    assert "restore the file" in said and "--no-seal" in said


@pytest.mark.parametrize("offset", [0, 2 * PAGE - 1, 3 * PAGE, SIZE - 1])
def test_another_byte_outside_the_ranges_is_a_stale_seal(diff: Path, offset: int) -> None:
    poke(diff, offset, b"!")
    with pytest.raises(SealError, match="a hole by its seal, and must be zeros, but are not"):
        opened(diff)


def test_a_seal_for_another_size_is_refused(diff: Path) -> None:
    os.truncate(diff, SIZE - PAGE)
    for policy in (TrustPolicy(), TrustPolicy(verify="no")):
        with pytest.raises(SealError, match=f"a seal for {SIZE} bytes, but .* has {SIZE - PAGE}"):
            Opener(policy).open(str(diff))


@pytest.mark.parametrize("text", [b"", b"<bmap/>", b"\0" * 100, b"<!DOCTYPE a><bmap/>"])
def test_what_is_no_seal_is_refused(diff: Path, text: bytes) -> None:
    Path(f"{diff}.bmap").write_bytes(text)
    for verify in ("no", "pins", "full"):
        with pytest.raises(SealError, match=r"not a usable bmap 2\.0 file"):
            opened(diff, verify=verify)


def test_a_seal_of_too_many_bytes_is_not_read(diff: Path) -> None:
    os.truncate(f"{diff}.bmap", bmap.MAX_BYTES + 1)
    with pytest.raises(SealError, match=f"a seal has at most {bmap.MAX_BYTES}"):
        opened(diff)


@pytest.mark.parametrize("change", ["grown", "cut", "overwritten"])
def test_a_seal_that_changes_while_it_is_read_is_refused(
    diff: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, known = Path(f"{diff}.bmap"), FileKey.of
    text = path.read_bytes()
    age(path)

    class Key:
        @staticmethod
        def of(status: os.stat_result) -> FileKey:
            key = known(status)
            match change:
                case "grown":
                    path.write_bytes(text + b"\n")
                case "cut":
                    path.write_bytes(text[:-1])
                case _:
                    path.write_bytes(text)
            return key

    monkeypatch.setattr(seal, "FileKey", Key)
    with pytest.raises(SealError, match=r"diff\.bmap: changed while it was read; try again"):
        seal.find(str(diff))


def test_a_range_without_a_checksum_must_be_zeros(diff: Path) -> None:
    path = Path(f"{diff}.bmap")
    lines = [line for line in path.read_text().splitlines() if "<Range" in line]
    edit(path, lines[1], "<Range> 5-6 </Range>")
    assert opened(diff).records == opened(diff, verify="full").records
    edit(path, lines[0], "<Range> 2 </Range>")
    with pytest.raises(SealError, match="without a checksum, so must be zeros, but are not"):
        opened(diff)
    layer = opened(diff, verify="no")
    assert layer.records[0].unchecked == 2
    assert list(layer.extents) == EXTENTS


def test_what_verify_no_lets_through_is_told(diff: Path, tmp_path: Path) -> None:
    edit(Path(f"{diff}.bmap"), ' chksum="', ' x="')
    base = write_layer(tmp_path / "base", SIZE, BASE)
    image = open_chain(base, [diff], TrustPolicy(verify="no"))
    assert image.view.read(0, SIZE) == ORACLE
    (line,) = image.overridden
    assert line.startswith("--verify=no overrides the check of seals: ") and "2 ranges" in line


def test_verify_no_compares_nothing_and_remembers_nothing(diff: Path) -> None:
    poke(diff, 2 * PAGE, b"!")
    assert list(opened(diff, verify="no").extents) == EXTENTS
    with pytest.raises(SealError, match="stale"):
        opened(diff)


# Remembering


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the layers that were compared with their seals."""
    paths: list[str] = []
    known = seal.compare

    def compare(layer: Layer, *arguments: object) -> None:
        paths.append(layer.path)
        known(layer, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(seal, "compare", compare)
    return paths


def test_a_comparison_is_paid_once_for_a_file(
    diff: Path, tmp_path: Path, compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_recent_files(monkeypatch)
    directory = str(tmp_path / "state")
    for _ in range(3):
        assert list(opened(diff, state_dir=directory).extents) == EXTENTS
    assert compared == [str(diff)]
    opened(diff, state_dir=directory, verify="full")
    assert compared == [str(diff)] * 2
    diff.chmod(0o600)  # another ctime: only costs another comparison
    opened(diff, state_dir=directory)
    assert compared == [str(diff)] * 3


def test_another_seal_is_compared_again(
    diff: Path, tmp_path: Path, compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_recent_files(monkeypatch)
    directory = str(tmp_path / "state")
    opened(diff, state_dir=directory)
    edit(Path(f"{diff}.bmap"), "<!-- The", "<!--  The")
    opened(diff, state_dir=directory)
    assert compared == [str(diff)] * 2


def test_what_failed_is_not_remembered(
    diff: Path, tmp_path: Path, compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_recent_files(monkeypatch)
    directory = str(tmp_path / "state")
    poke(diff, 2 * PAGE, b"!")
    for _ in range(2):
        with pytest.raises(SealError):
            opened(diff, state_dir=directory)
    assert len(compared) == 2


def test_a_layer_changed_just_before_it_was_compared_is_compared_again(
    diff: Path, tmp_path: Path, compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the comparison took: a store at its beginning may have moved no time stamp."""
    now = [diff.stat().st_ctime_ns + 1]
    known = seal.compare

    def slowly(layer: Layer, *arguments: object) -> None:
        known(layer, *arguments)  # type: ignore[arg-type]
        now[0] += 10**11

    monkeypatch.setattr(seal, "compare", slowly)
    monkeypatch.setattr(time, "time_ns", lambda: now[0])
    directory = str(tmp_path / "state")
    for _ in range(3):
        opened(diff, state_dir=directory)
    assert compared == [str(diff)] * 2  # remembered since the second, which began late enough


def test_what_is_remembered_is_no_good_to_a_layer_that_changed_since_it_was_opened(
    diff: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = seal.find(str(diff))
    assert stored is not None

    class Memory(Remembered):
        def recall(self, kind: str, identity: Identity) -> str | None:
            poke(diff, 2 * PAGE, b"!")
            return stored.digest if stored else None

    with pytest.raises(LayerChangedError):
        seal.compare_once(Layer.open(str(diff)), stored, Memory())


def accept_recent_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember the identities of files that were just written, which otherwise are not kept."""
    monkeypatch.setattr(
        "diffmergefs.sidecars.verified.Identity.is_final", lambda identity, since_ns: True
    )


# While it changes


def test_a_layer_that_changes_while_it_is_compared(
    diff: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = seal.sha256

    def change(layer: Layer, *arguments: object) -> bytes:
        digest = known(layer, *arguments)  # type: ignore[arg-type]
        poke(diff, 0, b"\0")
        return digest

    monkeypatch.setattr(seal, "sha256", change)
    with pytest.raises(LayerChangedError, match="mtime"):
        opened(diff)


def test_a_sealed_layer_whose_bytes_change_is_tainted(diff: Path) -> None:
    layer = opened(diff)
    poke(diff, 2 * PAGE, b"!")
    with pytest.raises(LayerChangedError):
        layer.check_unchanged()


def test_a_sealed_layer_is_walked_again_as_the_filesystem_has_it(diff: Path) -> None:
    layer = opened(diff)
    diff.chmod(0o600)
    layer.check_unchanged()
    assert layer.tainted is None and list(layer.extents) == EXTENTS


# Where it is found


def test_a_symlink_has_the_seal_beside_it_or_beside_its_file(diff: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "layer"
    link.symlink_to(diff)
    layer = opened(link)
    assert layer.records[0].path == f"{diff}.bmap"
    Path(f"{diff}.bmap").rename(f"{link}.bmap")
    layer = opened(link)
    assert layer.records[0].path == f"{link}.bmap"
    assert opened(diff).records == ()


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_what_is_no_file_is_not_read_and_refused(diff: Path, kind: str) -> None:
    path = Path(f"{diff}.bmap")
    path.unlink()
    if kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(FileAccessError, match=r"diff\.bmap: a .*, not a regular file"):
        opened(diff)


def test_a_symlink_is_not_followed_in_a_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_tag(store, "base")
    filled(write_tag(store, "work", "base", layer=1) / "memory.bin")
    path = store / "work" / "memory.bin.bmap"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileAccessError, match="a symlink, not a regular file"):
        open_image(store / "work")


@pytest.mark.parametrize("numbered", [False, True])
def test_the_layers_of_a_store_go_by_their_seals(tmp_path: Path, numbered: bool) -> None:
    store = tmp_path / "store"
    if numbered:
        write_numbered(store, ["000-base.mem", "001-work.mem"])
        base, image = store / "000-base.mem", store / "001-work.mem"
        work = image
    else:
        base = write_tag(store, "base") / "memory.bin"
        image = write_tag(store, "work", "base", layer=1)
        work = image / "memory.bin"
    write_layer(base, SIZE, BASE)
    filled(work)
    found = open_image(image)
    with found.view as view:
        assert view.read(0, SIZE) == ORACLE and not found.dense


# Law 4 of a seal


def describe_trust(base: Path, diff: Path, policy: TrustPolicy | None = None) -> tuple[str, int]:
    image = open_chain(base, [diff], policy)
    layer = describe(image).layers[1]
    return layer.trust, layer.grain


def test_a_sealed_layer_is_called_so(diff: Path, tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, BASE)
    assert describe_trust(base, diff) == ("sealed", PAGE)
    seal_layer(base, policy=TrustPolicy(dense=True))
    assert describe(open_chain(base, [diff])).layers[0].trust == "sealed"


def test_a_seal_in_blocks_above_the_page_is_coarse(tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, BASE)
    diff = write_layer(tmp_path / "diff", SIZE, [(4 * PAGE, signed(1, 4 * PAGE, 4 * PAGE))])
    seal_layer(diff, policy=TrustPolicy(page_size=4 * PAGE))
    assert open_chain(base, [diff], TrustPolicy(page_size=4 * PAGE)).overridden == []
    with pytest.raises(UntrustedExtentsError, match=r"made in blocks of 16384 bytes") as caught:
        open_chain(base, [diff])
    assert caught.value.check == "grain"
    assert describe_trust(base, diff, TrustPolicy(trust_grain={"all"})) == (
        "overridden: grain",
        16384,
    )


def test_a_seal_with_ranges_off_the_page_is_unaligned(tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, BASE)
    diff = write_layer(tmp_path / "diff", SIZE, DIFF)
    seal_layer(diff)
    with pytest.raises(UntrustedExtentsError, match="does not begin and end on a page") as caught:
        open_chain(base, [diff], TrustPolicy(page_size=4 * PAGE))
    assert caught.value.check == "alignment"


def test_a_seal_over_a_whole_diff_is_dense(tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, BASE)
    diff = write_layer(tmp_path / "diff", SIZE, [(0, signed(1, 0, SIZE))])
    seal_layer(diff, policy=TrustPolicy(dense=True))
    with pytest.raises(DenseDiffError):
        open_chain(base, [diff])
    image = open_chain(base, [diff], TrustPolicy(dense=True))
    assert image.dense and image.view.read(0, SIZE) == signed(1, 0, SIZE)


# bmaptool, of Debian's package bmap-tools


@pytest.mark.programs
def test_bmaptools_maps_without_checksums(tmp_path: Path) -> None:
    diff = write_layer(tmp_path / "diff", SIZE, DIFF)
    bmaptool("create", "--no-checksum", "--output", f"{diff}.bmap", diff)
    with pytest.raises(SealError, match="without a checksum"):
        opened(diff)
    assert list(opened(diff, verify="no").extents) == EXTENTS


def test_what_is_read_to_compare(diff: Path) -> None:
    layer = opened(diff, no_seal=True)
    stored = seal.find(str(diff))
    assert stored is not None
    done: list[int] = []
    seal.compare(layer, stored, done.append)
    assert sum(done) == seal.compared_bytes(layer, stored) == SIZE
    sparse = write_layer(diff.with_name("sparse"), SIZE, DIFF)
    layer = opened(sparse)
    done.clear()
    seal.compare(layer, stored, done.append)
    assert sum(done) == seal.compared_bytes(layer, stored) == 3 * PAGE
    assert layer.walked == ExtentList(EXTENTS)
