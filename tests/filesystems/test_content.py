"""What only a diff's pages tell, held against its parents' view."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from diffmergefs.core import sparse
from diffmergefs.core.errors import UntrustedExtentsError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.fuse.nodes import ROOT_INODE
from diffmergefs.fuse.operations import Operations
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening import content
from diffmergefs.opening.content import Pages
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from tests.support import loopfs
from tests.support.commands import diffmergefs, mistake
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.stores import pages
from tests.support.subjects.content import dense_store, write_at

MIB = 1 << 20
SIZE = 16 * MIB
BASE = [(0, signed(0, 0, SIZE))]


# Copy-ups on overlayfs (law 4)


def copied_up_by_chmod(merged: Path) -> None:
    merged.chmod(0o600)


def copied_up_by_a_write(merged: Path) -> None:
    write_at(merged, 3 * 1024)


def copied_up_and_written_beside(merged: Path) -> None:
    write_at(merged, 1280, 1281, 1282, 1536)  # [4M, 5M) or [4M, 6M) is longer then


HARMED: list[tuple[list[int], int, Callable[[Path], None]]] = [
    ([1024], SIZE, copied_up_by_chmod),
    ([1024], SIZE, copied_up_by_a_write),  # [4M, 5M), and [12M, 12M + 4K), which is right
    ([5, 1024, 1025, 2000], SIZE, copied_up_by_a_write),
    ([1024], SIZE, copied_up_and_written_beside),
    ([1024, 1300], SIZE, copied_up_and_written_beside),
    ([7, 4090], SIZE, copied_up_by_a_write),  # a copy that ends with the file
    ([4090], 4095 * PAGE + 100, copied_up_by_chmod),  # shorter than a MiB, for the file ends
    (list(range(0, 512, 2)), SIZE, copied_up_by_a_write),  # half of the pages were written
]


@pytest.mark.parametrize(("numbers", "size", "copy_up"), HARMED)
def test_a_diff_copied_up_is_refused_however_that_came(
    overlay_fs: loopfs.Overlay, numbers: list[int], size: int, copy_up: Callable[[Path], None]
) -> None:
    base = write_layer(overlay_fs.lower / "base", size, [(0, signed(0, 0, size))])
    write_layer(overlay_fs.lower / "diff", size, pages(1, numbers))
    diff = overlay_fs.merged / "diff"
    right = overlay_oracle(size, [[(0, signed(0, 0, size))], pages(1, numbers)])
    assert open_chain(base, [diff]).view.read(0, size) == right
    copy_up(diff)
    with pytest.raises(UntrustedExtentsError, match=r"overlayfs has \d+ pages of zeros") as caught:
        open_chain(base, [diff])
    assert caught.value.check == "copy-up" and "--trust-grain" in str(caught.value)
    (line,) = open_chain(base, [diff], TrustPolicy(trust_grain={"all"})).overridden
    assert line.startswith("--trust-grain overrides the check of copy-up: ")


HEALTHY: list[list[tuple[int, bytes]]] = [
    pages(1, [5, 700]),
    [(0, bytes(MIB)), *pages(1, range(256, 300))],  # a wiped MiB beside a written run
    [*pages(1, range(100)), (100 * PAGE, bytes(MIB)), *pages(1, range(356, 400))],
    pages(1, range(256, 512)),  # a whole MiB, all of it written
    [(MIB, bytes(MIB))],  # a whole MiB wiped
    [(0, bytes(MIB)), *pages(1, range(512, 513))],
    [(MIB, bytes(MIB)), *pages(0, range(256, 300))],  # zeros, beside pages of a wiped parent
    [*pages(1, range(4000, 4096)), (4095 * PAGE, bytes(PAGE))],  # the end of memory, in use
]


@pytest.mark.parametrize("number", range(len(HEALTHY)))
def test_a_diff_that_was_made_on_an_overlay_is_trusted(
    overlay_fs: loopfs.Overlay, number: int
) -> None:
    held = HEALTHY[number]
    under = [BASE[0], (0, bytes(2 * MIB))] if number == 6 else BASE
    base = write_layer(overlay_fs.merged / "base", SIZE, under)
    diff = write_layer(overlay_fs.merged / "diff", SIZE, held)
    image = open_chain(base, [diff])
    assert image.view.read(0, SIZE) == overlay_oracle(SIZE, [under, held])
    assert image.overridden == []


def test_such_an_extent_is_trusted_elsewhere(real_fs: Path) -> None:
    base = write_layer(real_fs / "base", SIZE, BASE)
    held = [(4 * MIB, bytes(MIB)), *pages(1, [1024])]
    diff = write_layer(real_fs / "diff", SIZE, held)
    assert sparse.filesystem_magic(Layer.open(str(diff)).fd) != sparse.OVERLAYFS_MAGIC
    assert open_chain(base, [diff]).overridden == []


def test_pages_of_16_kib_are_not_filled_where_a_quarter_is_zero(overlay_fs: loopfs.Overlay) -> None:
    base = write_layer(overlay_fs.merged / "base", SIZE, BASE)
    held = [(0, signed(1, 0, MIB)), *((n * 4 * PAGE, bytes(PAGE)) for n in range(64))]
    diff = write_layer(overlay_fs.merged / "diff", SIZE, held)
    with pytest.raises(UntrustedExtentsError):
        open_chain(base, [diff])
    assert open_chain(base, [diff], TrustPolicy(page_size=16384)).overridden == []


def test_the_parents_view_counts_and_not_the_parents_file(overlay_fs: loopfs.Overlay) -> None:
    base = write_layer(overlay_fs.lower / "base", SIZE, BASE)
    wiped = write_layer(overlay_fs.lower / "wiped", SIZE, [(4 * MIB, bytes(MIB))])
    write_layer(overlay_fs.lower / "diff", SIZE, pages(2, [1024]))
    diff = overlay_fs.merged / "diff"
    diff.chmod(0o600)
    # Over the wiped MiB the zeros that the copy made hide nothing.
    image = open_chain(base, [wiped, diff])
    expected = overlay_oracle(SIZE, [BASE, [(4 * MIB, bytes(MIB))], pages(2, [1024])])
    assert image.view.read(0, SIZE) == expected
    with pytest.raises(UntrustedExtentsError):
        open_chain(base, [diff])


def test_where_the_parent_is_not_known_it_is_a_warning(overlay_fs: loopfs.Overlay) -> None:
    write_layer(overlay_fs.lower / "diff", SIZE, pages(1, [1024]))
    diff = overlay_fs.merged / "diff"
    write_at(diff, 3 * 1024)
    done = diffmergefs("seal", "--json", diff)
    (line,) = json.loads(done.stdout)[0]["hints"]
    assert line.startswith(f"{diff}: the extent [{4 * MIB}, {5 * MIB}) on overlayfs has 255 pages")
    assert done.returncode == 0 and done.stderr.splitlines() == [f"diffmergefs: {line}"]


def test_apply_refuses_a_copy_up(overlay_fs: loopfs.Overlay, tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, BASE)
    write_layer(overlay_fs.lower / "diff", SIZE, pages(1, [1024]))
    diff = overlay_fs.merged / "diff"
    write_at(diff, 3 * 1024)
    assert "[4194304, 5242880) on overlayfs has 255 pages" in mistake(5, "apply", diff, base)
    assert base.read_bytes() == BASE[0][1]
    done = diffmergefs("apply", "--trust-grain=copy-up", diff, base)
    assert done.returncode == 0 and "overrides the check of copy-up" in done.stderr


@pytest.mark.parametrize("verb", ["info", "verify", "flatten"])
def test_every_verb_refuses_a_copy_up(
    overlay_fs: loopfs.Overlay, tmp_path: Path, verb: str
) -> None:
    base = write_layer(overlay_fs.lower / "base", SIZE, BASE)
    write_layer(overlay_fs.lower / "diff", SIZE, pages(1, [1024]))
    diff = overlay_fs.merged / "diff"
    write_at(diff, 3 * 1024)
    output = ("-o", tmp_path / "out") if verb == "flatten" else ()
    done = diffmergefs(verb, "--base", base, "--diff", diff, *output)
    assert done.returncode == (1 if verb == "verify" else 5)
    assert "copy-up" in done.stdout + done.stderr and not (tmp_path / "out").exists()


# Each layer once


def test_a_mount_samples_each_link_once_and_within_the_processors_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = dense_store(tmp_path / "store", 30)
    store = Store(
        str(tmp_path / "store"), TrustPolicy(state_dir=str(tmp_path / "state"), verify="no")
    )
    store.look()
    operations = Operations(Tree("/somewhere", store))
    seen: list[tuple[str, int]] = []
    real = content.sample

    def counted(parents: content.Read, below: ExtentList, layer: Layer) -> Pages:
        seen.append((layer.path, operations.opener.hashing.busy))
        return real(parents, below, layer)

    monkeypatch.setattr(content, "sample", counted)

    async def look_up(tag: str) -> None:
        folder = await operations.lookup(ROOT_INODE, tag.encode(), None)  # type: ignore[arg-type]
        await operations.lookup(folder.st_ino, b"memory.bin", None)  # type: ignore[arg-type]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for tag in tags:
                nursery.start_soon(look_up, tag)

    trio.run(main)
    assert sorted(path for path, _ in seen) == [f"{tag}/memory.bin" for tag in tags]
    limit = os.cpu_count() or 1
    assert all(1 <= borrowed <= limit for _, borrowed in seen)
