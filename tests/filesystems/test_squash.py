"""squash on each file system: written zeros, the grain, shared blocks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.errors import UntrustedExtentsError
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.diffs import squash
from diffmergefs.writing.sealing import seal_layer
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.newdiffs import data_of
from tests.support.randomchains import open_view, write_chain
from tests.support.stores import pages
from tests.support.subjects.diffs import CHAIN, SIZE, joined, layers

__all__ = ["layers"]

MIB = 1 << 20
IMAGE = overlay_oracle(SIZE, CHAIN)


def test_on_real_filesystems_written_zeros_stay_data(real_fs: Path) -> None:
    paths = write_chain(real_fs, SIZE, CHAIN)
    result = squash(open_view(paths), real_fs / "diff", verify=True)
    assert (result.first, result.last) == (1, 3)
    assert data_of(real_fs / "diff") == joined(*CHAIN[1:])
    # Trusted as any diff is, and the same over the base.
    assert open_chain(paths[0], [real_fs / "diff"]).view.read(0, SIZE) == IMAGE
    assert sorted(os.listdir(real_fs)) == ["000.mem", "001.mem", "002.mem", "003.mem", "diff"]


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_large_pieces_are_shared_where_the_filesystem_can(
    filesystem: Callable[[str], Path], kind: str
) -> None:
    place = filesystem(kind)
    size = 8 * MIB
    one, other = [(0, signed(1, 0, 4 * MIB))], [(MIB, signed(2, MIB, PAGE)), *pages(2, [2000])]
    paths = write_chain(place, size, [[], one, other])
    result = squash(open_view(paths), place / "diff", verify=True)
    assert result.written.shared == 4 * MIB - PAGE and result.written.copied == 2 * PAGE
    assert (place / "diff").read_bytes() == overlay_oracle(size, [one, other])
    shutil.rmtree(place)


@pytest.mark.parametrize("kind", ["btrfs", "xfs", "ext4"])
@pytest.mark.parametrize("harm", ["zeros became holes", "holes became zeros"])
def test_the_extents_are_those_of_seals(
    filesystem: Callable[[str], Path], kind: str, harm: str
) -> None:
    place = filesystem(kind)
    size = 8 * MIB
    zeros, data = [(2 * MIB, bytes(2 * MIB))], pages(1, [1500])
    paths = write_chain(place, size, [[(0, signed(0, 0, size))], zeros + data])
    seal_layer(paths[1])
    content = paths[1].read_bytes()
    if harm == "zeros became holes":
        write_layer(paths[1], size, data)
    else:
        write_layer(paths[1], size, [(0, content)])
    assert data_of(paths[1]) != joined(zeros, data)
    with open_chain(paths[0], [paths[1]]).view as view:
        result = squash(view, place / "diff", verify=True)
        expected = view.read(0, size)
    assert data_of(place / "diff") == joined(zeros, data)
    assert result.written.shared == 0
    assert open_chain(paths[0], [place / "diff"]).view.read(0, size) == expected
    shutil.rmtree(place)


def test_a_filesystem_with_a_coarse_grain_is_refused(
    layers: list[Path], filesystem: Callable[[str], Path]
) -> None:
    place = filesystem("xfs16k")
    with pytest.raises(UntrustedExtentsError, match="coarser than the guest page"):
        squash(open_view(layers), place / "diff")
    with pytest.raises(UntrustedExtentsError, match="its filesystem reports"):
        squash(open_view(layers), place / "diff", policy=TrustPolicy(trust_grain={"all"}))
    assert os.listdir(place) == []
