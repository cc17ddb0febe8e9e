"""How copies treat a diff's holes (facts of cp, tar and the like), with and without its seal.

Each row is a way to copy a file. What it does to the holes differs from one file system to the
next; what a seal brings back does not.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs import TrustPolicy, apply_diff, flatten, open_chain, open_image, seal_layer
from diffmergefs.core.errors import DenseDiffError, UntrustedExtentsError
from diffmergefs.core.layer import Layer
from tests.support import loopfs
from tests.support.coreutils import coreutils
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.stores import write_tag

SIZE = 3 * 1024 * 1024 + PAGE
BASE = [(0, signed(0, 0, SIZE))]
# Written pages, a page of zeros by itself, one at the end of data, a run of them, and the last.
DIFF = [
    *((n * PAGE, signed(1, n * PAGE, PAGE)) for n in (1, 2, 300, 512)),
    *((n * PAGE, bytes(PAGE)) for n in (3, 100, *range(400, 420), SIZE // PAGE - 1)),
]
ORACLE = overlay_oracle(SIZE, [BASE, DIFF])

Copy = Callable[[Path, Path], None]


def command(*words: str) -> Copy:
    def copy(source: Path, target: Path) -> None:
        paths = {"FROM": str(source), "TO": str(target)}
        text = [paths.get(word, word) for word in words]
        subprocess.run(text, check=True, capture_output=True)

    return copy


def shell(text: str) -> Copy:
    """A command in which $1 is the source, $2 the target, $3 and $4 their directories."""

    def copy(source: Path, target: Path) -> None:
        paths = map(str, (source, target, source.parent, target.parent))
        subprocess.run(["sh", "-c", text, "sh", *paths], check=True, capture_output=True)

    return copy


def dig_holes(source: Path, target: Path) -> None:
    command("cp", "--sparse=never", "FROM", "TO")(source, target)
    subprocess.run(["fallocate", "--dig-holes", str(target)], check=True)


def move_from_another_filesystem(source: Path, target: Path) -> None:
    """mv can rename only within one filesystem; otherwise it copies, and removes its source."""
    with tempfile.TemporaryDirectory() as elsewhere:
        source_there = Path(elsewhere) / source.name
        shell(TAR.format("-S"))(source, source_there)
        assert source_there.stat().st_dev != target.parent.stat().st_dev
        subprocess.run(["mv", source_there, target], check=True)


def copyfile(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def upload_and_download(source: Path, target: Path) -> None:
    """An object store has bytes only."""
    target.write_bytes(source.read_bytes())


TAR = 'tar -C "$3" {} -cf - "$(basename "$1")" | tar -C "$4" -xf -'
CONVERT = 'qemu-img convert {} -f raw -O raw "$1" "$2"'
ROWS: dict[str, Copy] = {
    "cp": command("cp", "FROM", "TO"),
    "cp -a": command("cp", "-a", "FROM", "TO"),
    "install": command("install", "FROM", "TO"),
    "cp --reflink=never": command("cp", "--reflink=never", "FROM", "TO"),
    "cp --sparse=always": command("cp", "--sparse=always", "FROM", "TO"),
    "dd conv=sparse": command("sh", "-c", 'dd if="$0" of="$1" bs=4096 conv=sparse', "FROM", "TO"),
    "fallocate -d": dig_holes,
    "mv": move_from_another_filesystem,
    "rsync -S": command("rsync", "-S", "FROM", "TO"),
    "qemu-img convert": shell(CONVERT.format("")),
    "cat": shell('cat "$1" >"$2"'),
    "cat in a pipe": shell('cat "$1" | cat >"$2"'),
    "cp --sparse=never": command("cp", "--sparse=never", "FROM", "TO"),
    "tar": shell(TAR.format("")),
    "rsync": command("rsync", "FROM", "TO"),
    "qemu-img convert -S 0": shell(CONVERT.format("-S 0")),
    "shutil.copyfile": copyfile,
    "object store": upload_and_download,
    "tar -S": shell(TAR.format("-S")),
    "cp --reflink=always": command("cp", "--reflink=always", "FROM", "TO"),
}


# What becomes of the holes without a seal: 'lost' (pages of zeros became holes, and nothing shows
# it), 'filled' (no hole is left), 'right'. cp, install and cat of coreutils 9 share the blocks
# where the file system can, unless told not to; since 9.4 `cp --sparse=never` tells them that too.
OUTCOMES = {
    "cp": "lost",
    "cp -a": "lost",
    "install": "lost",
    "cp --reflink=never": "lost",
    "cp --sparse=always": "lost",
    "dd conv=sparse": "lost",
    "fallocate -d": "lost",
    "mv": "lost",
    "rsync -S": "lost",
    "qemu-img convert": "lost",
    "cat": "filled",
    "cat in a pipe": "filled",
    "cp --sparse=never": "filled",
    "tar": "filled",
    "rsync": "filled",
    "qemu-img convert -S 0": "filled",
    "shutil.copyfile": "filled",
    "object store": "filled",
    "tar -S": "right",
    "cp --reflink=always": "right",
}
SHARED = {"cp", "cp -a", "install", "cp --sparse=always", "cp --sparse=never", "cat"}
SHARING = {"xfs", "btrfs"}
#: Since coreutils 9.2 these look for zeros only where the file system reports no holes.
KEEPING = {"cp", "cp -a", "install", "cp --reflink=never", "mv"}
KINDS = ("ext4", "xfs", "btrfs", "tmpfs")
CASES = [
    (kind, row) for kind in KINDS for row in ROWS if kind in SHARING or row != "cp --reflink=always"
]


# A file that grows while it is written gets blocks in advance from xfs; those over which the writer
# seeks stay in it, unwritten, and law 4 refuses them.
GROWING = {"cp --reflink=never", "dd conv=sparse", "tar -S", "mv", "rsync -S"}
#: These allocate all of the file there beforehand.
ALLOCATING = {"qemu-img convert"}
#: Which pages become holes is their own affair: shared blocks leave some zeros, and the first page
#: of all is written.
PARTLY = {"fallocate -d", "qemu-img convert"}


def outcome(kind: str, row: str) -> str:
    never_shares = row == "cp --sparse=never" and coreutils() >= (9, 4)
    if kind in SHARING and row in SHARED and not never_shares:
        return "right"
    if kind == "xfs" and row in GROWING | ALLOCATING:
        return "preallocated"
    return "right" if row in KEEPING and coreutils() >= (9, 2) else OUTCOMES[row]


def make_layers(root: Path) -> tuple[Path, Path]:
    """A base, and a diff in another directory, where its copies do not have its name taken."""
    (root / "taken").mkdir()
    base = write_layer(root / "base", SIZE, BASE)
    return base, write_layer(root / "taken" / "diff", SIZE, DIFF)


def read_all(base: Path, diff: Path, policy: TrustPolicy | None = None) -> bytearray:
    with open_chain(base, [diff], policy).view as view:
        return view.read(0, SIZE)


def walked(path: Path) -> list[tuple[int, int]]:
    layer = Layer.open(str(path))
    try:
        return [(start, stop) for start, stop in layer.walked]
    finally:
        layer.close()


@pytest.fixture
def place(filesystem: Callable[[str], Path], kind: str) -> Path:
    return filesystem(kind)


@pytest.mark.parametrize(("kind", "row"), CASES)
def test_a_copy_without_its_seal(place: Path, kind: str, row: str) -> None:
    base, diff = make_layers(place)
    copy = place / "diff"
    ROWS[row](diff, copy)
    assert copy.read_bytes() == diff.read_bytes()  # the bytes survive, whatever happens
    match outcome(kind, row):
        case "right":
            assert walked(copy) == walked(diff)
            assert read_all(base, copy) == ORACLE
        case "lost":
            lost = [(offset, data) for offset, data in DIFF if any(data)]
            assert len(walked(copy)) < len(walked(diff))
            shown = read_all(base, copy)
            if row not in PARTLY:
                assert shown == overlay_oracle(SIZE, [BASE, lost])
            assert shown != ORACLE
        case "preallocated":
            with pytest.raises(UntrustedExtentsError, match="preallocated and unwritten"):
                read_all(base, copy)
        case _:
            assert walked(copy) == [(0, SIZE)]
            with pytest.raises(DenseDiffError, match="a diff without a hole"):
                read_all(base, copy)


@pytest.mark.parametrize(("kind", "row"), CASES)
def test_a_copy_with_its_seal_merges_right_again(place: Path, kind: str, row: str) -> None:
    base, diff = make_layers(place)
    seal = Path(seal_layer(diff).path)
    copy = place / "diff"
    ROWS[row](diff, copy)
    # It fills a file up to whole sectors.
    copy_seal = shutil.copyfile if row.startswith("qemu-img") else ROWS[row]
    copy_seal(seal, place / "diff.bmap")
    with unchanged([base, diff, seal, copy, place / "diff.bmap"]):
        assert read_all(base, copy) == ORACLE
        with open_chain(base, [copy]).view as view:
            assert view.layers[1].extents.data_bytes == len(DIFF) * PAGE
            flatten(view, place / "flat", verify=True)
        whole = place / "whole"
        shutil.copyfile(base, whole)
        assert apply_diff(copy, whole) == len(DIFF) * PAGE
    assert whole.read_bytes() == (place / "flat").read_bytes() == ORACLE


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_was_unpacked_by_plain_tar_merges_right_with_its_seals(place: Path) -> None:
    store = place / "store"
    base = write_tag(store, "base", size=SIZE, numbers=[])
    work = write_tag(store, "work", "base", size=SIZE, numbers=[])
    write_layer(base / "memory.bin", SIZE, BASE)
    seal_layer(write_layer(work / "memory.bin", SIZE, DIFF))
    (place / "copy").mkdir()
    shell(TAR.format(""))(store, place / "copy" / "store")
    copy = place / "copy" / "store" / "work"
    assert walked(copy / "memory.bin") == [(0, SIZE)]
    with open_image(copy).view as view:
        assert view.read(0, SIZE) == ORACLE
    (copy / "memory.bin.bmap").unlink()
    with pytest.raises(DenseDiffError, match="holes were filled"):
        open_image(copy)


@pytest.mark.parametrize("kind", ["xfs16k", "tmpfs_huge"])
def test_a_copy_on_a_filesystem_with_a_coarse_grain(
    filesystem: Callable[[str], Path], place: Path
) -> None:
    base, diff = make_layers(filesystem("ext4"))
    seal = seal_layer(diff).path
    copy = place / "diff"
    command("cp", "--sparse=auto", "FROM", "TO")(diff, copy)
    with pytest.raises((UntrustedExtentsError, DenseDiffError)):
        read_all(base, copy)
    shutil.copyfile(seal, f"{copy}.bmap")
    assert read_all(base, copy) == ORACLE


def test_a_copy_up_by_overlayfs(overlay_fs: loopfs.Overlay) -> None:
    _, diff = make_layers(overlay_fs.lower)
    seal_layer(diff)
    merged = overlay_fs.merged / "taken" / "diff"
    merged.chmod(0o640)
    with pytest.raises(UntrustedExtentsError, match="copy-up"):
        read_all(overlay_fs.merged / "base", merged, TrustPolicy(no_seal=True))
    assert read_all(overlay_fs.merged / "base", merged) == ORACLE


def test_each_row_has_its_outcome() -> None:
    assert {*OUTCOMES} == {*ROWS} and {*ROWS} > SHARED | KEEPING
