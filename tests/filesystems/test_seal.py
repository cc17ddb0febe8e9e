"""Seals against bmaptool, and on file systems whose holes vanish."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.errors import DenseDiffError, SealError, UntrustedExtentsError
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars import seal
from diffmergefs.writing.sealing import seal_layer
from tests.support.images import PAGE, signed, write_layer
from tests.support.subjects.seal import (
    BASE,
    DIFF,
    EXTENTS,
    ORACLE,
    SIZE,
    bmaptool,
    diff,
    opened,
    poke,
)

__all__ = ["diff"]


def test_holes_that_vanish_from_a_sealed_file_are_no_change_if_they_are_zeros(
    filesystem: Callable[[str], Path],
) -> None:
    path = write_layer(filesystem("tmpfs") / "diff", SIZE, DIFF)
    seal_layer(path)
    layer = opened(path)
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(10 * PAGE)
        file.write(bytes(PAGE))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    layer.check_unchanged()
    assert list(layer.extents) == EXTENTS
    assert (10 * PAGE, 11 * PAGE) not in list(layer.extents)


def test_bmaptool_reads_ours(real_fs: Path) -> None:
    diff = write_layer(real_fs / "diff", SIZE - 100, DIFF)
    seal_layer(diff)
    with open(real_fs / "copy", "wb") as file:
        file.truncate(SIZE - 100)
    bmaptool("copy", "--bmap", f"{diff}.bmap", diff, real_fs / "copy")
    assert (real_fs / "copy").read_bytes() == diff.read_bytes()
    poke(diff, 2 * PAGE, b"!")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        bmaptool("copy", "--bmap", f"{diff}.bmap", diff, real_fs / "copy")
    assert b"checksum mismatch" in caught.value.stderr


def test_ours_reads_bmaptools(real_fs: Path) -> None:
    base = write_layer(real_fs / "base", SIZE, BASE)
    diff = write_layer(real_fs / "diff", SIZE, DIFF)
    bmaptool("create", "--output", f"{diff}.bmap", diff)
    diff.write_bytes(diff.read_bytes())
    with open_chain(base, [diff]).view as view:
        assert list(view.layers[1].extents) == EXTENTS
        assert view.read(0, SIZE) == ORACLE
    poke(diff, 2 * PAGE, b"!")
    with pytest.raises(SealError, match="stale"):
        open_chain(base, [diff])


def test_bmaptools_map_on_a_filesystem_with_large_blocks_is_coarse(
    filesystem: Callable[[str], Path],
) -> None:
    place = filesystem("xfs16k")
    base = write_layer(place / "base", SIZE, BASE)
    diff = write_layer(place / "diff", SIZE, DIFF)
    bmaptool("create", "--output", f"{diff}.bmap", diff)
    with pytest.raises(UntrustedExtentsError, match="made in blocks of 16384 bytes"):
        open_chain(base, [diff])
    vouched = open_chain(base, [diff], TrustPolicy(trust_grain={"all"}))
    assert [line.split(":")[0] for line in vouched.overridden] == [
        "--trust-grain overrides the check of grain"
    ]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_bmaptools_map_of_a_preallocated_diff_is_dense(
    filesystem: Callable[[str], Path], kind: str
) -> None:
    place = filesystem(kind)
    base = write_layer(place / "base", SIZE, BASE)
    diff = place / "diff"
    with diff.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
        file.seek(2 * PAGE)
        file.write(signed(1, 2 * PAGE, PAGE))
    assert diff.read_bytes()  # its pages are cached: now all of it is data
    bmaptool("create", "--output", f"{diff}.bmap", diff)
    (extent,) = seal.read(f"{diff}.bmap").content.extents()
    assert extent == (0, SIZE)
    with pytest.raises(DenseDiffError):
        open_chain(base, [diff])
    assert open_chain(base, [diff], TrustPolicy(dense=True)).dense
