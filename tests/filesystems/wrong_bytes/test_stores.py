"""A memory file that nothing calls a base, on every filesystem: without a hole it is one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.opening.images import open_image
from tests.filesystems.wrong_bytes.diffs import SIZE, Extents
from tests.filesystems.wrong_bytes.places import (
    FUSE_OVERLAYFS,
    Place,
    directly,
    lower,
    packed,
    upper,
)
from tests.support.commands import diffmergefs, succeed
from tests.support.images import overlay_oracle, signed, write_layer

#: As a VMM writes all of a guest's memory: what is zero is written too.
WHOLE: Extents = [(0, signed(0, 0, SIZE // 2)), (SIZE // 2, bytes(SIZE // 2))]
#: As it writes what is dirty.
DIRTY: Extents = [(SIZE // 4, signed(1, SIZE // 4, SIZE // 8))]

#: Where it can be told that a file has no hole.
EXACT = [
    *(directly(kind) for kind in ("ext4", "xfs", "btrfs", "tmpfs")),
    upper("ext4"),
    lower(directly("xfs")),
]
#: Where holes are made of zeros, or are hidden.
OTHERS = [
    *(packed(kind) for kind in ("squashfs", "erofs")),
    lower(packed("squashfs")),
    directly("tmpfs_huge"),
    FUSE_OVERLAYFS,
]


def put(directory: Path, extents: Extents) -> None:
    write_layer(directory / "1-a.mem", SIZE, extents)


@pytest.mark.parametrize("place", [*EXACT, *OTHERS], ids=lambda place: place.name)
@pytest.mark.parametrize("extents", [WHOLE, DIRTY], ids=["whole", "dirty"])
def test_a_lowest_number_that_is_not_0(
    extents: Extents,
    place: Place,
    filesystem: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    oracle = overlay_oracle(SIZE, [extents])
    with place.filled(filesystem, lambda directory: put(directory, extents)) as directory:
        image, out = directory / "1-a.mem", tmp_path / "out"
        if place in EXACT and extents is WHOLE:
            with open_image(image).view as view:
                assert view.read(0, SIZE) == oracle
        else:
            with pytest.raises(DiffMergeError, match=r"1-a\.mem: .*ha(s|ve) holes, and 1 layer"):
                open_image(image)
            done = diffmergefs("flatten", image, "-o", out)
            assert done.returncode in (3, 5) and not out.exists()
        succeed("flatten", "--allow-gaps", image, "-o", out)
        assert out.read_bytes() == oracle


@pytest.mark.parametrize("place", [EXACT[0], *OTHERS[:3]], ids=lambda place: place.name)
@pytest.mark.parametrize("extents", [WHOLE, DIRTY], ids=["whole", "dirty"])
def test_a_tag_without_a_document(
    extents: Extents, place: Place, filesystem: Callable[[str], Path], tmp_path: Path
) -> None:
    def fill(directory: Path) -> None:
        for tag in ("plain", "stated"):
            (directory / tag).mkdir()
            write_layer(directory / tag / "memory.bin", SIZE, extents)
            (directory / tag / "vmstate").touch()
        (directory / "stated" / "snapshot.json").write_text('{"memory": "memory.bin"}')

    with place.filled(filesystem, fill) as directory:
        with open_image(directory / "stated").view as view:
            assert view.read(0, SIZE) == overlay_oracle(SIZE, [extents])
        done = diffmergefs("info", directory / "plain")
        is_base = place in EXACT and extents is WHOLE
        assert (done.returncode == 0) == is_base, done
        assert is_base or '"memory": "memory.bin"' in done.stderr
        # A base may be copied in any way that keeps its bytes; what has no holes then is a base.
        shutil.copytree(directory / "plain", tmp_path / "plain")
        assert diffmergefs("info", tmp_path / "plain").returncode == 0
