"""What only a diff's pages tell, held against its parents' view."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import trio

from diffmergefs.core import sparse
from diffmergefs.core.errors import DenseDiffError, UntrustedExtentsError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.nodes import ROOT_INODE
from diffmergefs.fuse.operations import Operations
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening import content, dense
from diffmergefs.opening.content import Pages, compare_pages
from diffmergefs.opening.images import open_chain, open_snapshot
from diffmergefs.opening.opener import LayerPool
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import read_catalog
from tests.support import loopfs
from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.stores import age, pages, write_chain

MIB = 1 << 20
SIZE = 16 * MIB
BASE = [(0, signed(0, 0, SIZE))]


def test_pages_are_zero_equal_other_or_new(tmp_path: Path) -> None:
    size = 5 * PAGE + 100
    base = Layer.open(str(write_layer(tmp_path / "base", size, pages(0, range(1, 4)))))
    held = [(0, bytes(size)), *pages(0, [1]), *pages(1, [0, 3]), (5 * PAGE, b"end" * 10)]
    layer = Layer.open(str(write_layer(tmp_path / "diff", size, held)))
    found = compare_pages(MergedView([base]).read, layer, 0, size)
    assert found == Pages(zero=1, equal=1, other=1, new=2)
    assert (found.over, found.written) == (3, 4)
    assert compare_pages(None, layer, 0, size) == Pages(zero=2, equal=0, other=4, new=0)


# Copy-ups on overlayfs (law 4)


def write_at(path: Path, *numbers: int, layer: int = 2) -> None:
    """Write whole pages, signed as this layer's, with write(2)."""
    with path.open("r+b", buffering=0) as file:
        for offset, data in pages(layer, numbers):
            os.pwrite(file.fileno(), data, offset)
        os.fsync(file.fileno())


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


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the layers whose pages were sampled, each time that it happens."""
    found: list[str] = []
    real = dense.sample

    def counted(parents: content.Read, below: ExtentList, layer: Layer) -> Pages:
        found.append(layer.path)
        return real(parents, below, layer)

    monkeypatch.setattr(dense, "sample", counted)
    return found


def dense_store(store: Path, count: int) -> list[str]:
    """A chain of so many dense links over a base; their tags, oldest first."""
    tags = ["base", *(f"t{n:03}" for n in range(count))]
    write_chain(store, tags)
    for n, tag in enumerate(tags):
        memory = store / tag / "memory.bin"
        write_layer(memory, 16 * PAGE, [(0, signed(0, 0, 16 * PAGE)), *pages(n, [n % 16])])
        age(memory)
    return tags[1:]


def opened(store: Path, tags: Iterable[str], policy: TrustPolicy) -> None:
    """Open each tag by itself, as a mount does: only what is remembered links them."""
    catalog = read_catalog(str(store))
    root = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    try:
        pool = LayerPool(root, policy)
        for tag in tags:
            assert open_snapshot(catalog.chain(tag), pool, policy).dense
    finally:
        os.close(root)


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_store_of_100_dense_links_is_sampled_100_times(
    tmp_path: Path, looks: list[str], newest_first: bool
) -> None:
    tags = dense_store(tmp_path / "store", 100)
    policy = TrustPolicy(state_dir=str(tmp_path / "state"))
    opened(tmp_path / "store", reversed(tags) if newest_first else tags, policy)
    assert len(looks) == len(set(looks)) == 100


def test_what_was_found_is_known_in_later_runs_until_a_layer_is_another(
    tmp_path: Path, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffmergefs.sidecars.verified._COARSE_TICK_NS", 0)
    monkeypatch.setattr("diffmergefs.sidecars.verified._TICK_NS", 0)
    tags = dense_store(tmp_path / "store", 3)
    policy = TrustPolicy(state_dir=str(tmp_path / "state"))
    opened(tmp_path / "store", tags, policy)
    opened(tmp_path / "store", tags, policy)
    assert len(looks) == 3
    opened(tmp_path / "store", tags, TrustPolicy(state_dir=policy.state_dir, verify="full"))
    assert len(looks) == 6
    # Those above another layer are looked into again, those below it not.
    write_at(tmp_path / "store" / "t001" / "memory.bin", 3)
    opened(tmp_path / "store", tags, policy)
    assert [path.split("/")[0] for path in looks[6:]] == ["t001", "t002"]


def test_a_refusal_is_found_once_for_all_descendants(tmp_path: Path, looks: list[str]) -> None:
    store = tmp_path / "store"
    tags = dense_store(store, 20)
    write_layer(store / "t000" / "memory.bin", 16 * PAGE, [(0, bytes(16 * PAGE)), *pages(1, [1])])
    found = json.loads(succeed("list", "--json", store))
    assert [row["state"] for row in found] == ["complete", *["broken"] * 20]
    catalog = read_catalog(str(store))
    root = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    pool = LayerPool(root, TrustPolicy())
    for tag in tags:
        with pytest.raises(DenseDiffError):
            open_snapshot(catalog.chain(tag), pool, TrustPolicy())
    os.close(root)
    assert looks == ["t000/memory.bin"]


def test_reading_a_sample_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_MOST", 200)
    monkeypatch.setattr(dense, "_SAMPLE", 100)
    monkeypatch.setattr(dense, "_ENOUGH", 3)
    asked: list[int] = []
    real = Layer.read_into

    def counted(self: Layer, buffer: memoryview, offset: int, *, nowait: bool = False) -> None:
        asked.append(offset)
        real(self, buffer, offset, nowait=nowait)

    monkeypatch.setattr(Layer, "read_into", counted)
    size = 1000 * PAGE
    for written, reads in ((1000, 100), (20, None), (0, 200)):
        held = [(0, bytes(size)), *pages(0, range(0, 1000, 1000 // max(written, 1))[:written])]
        base = Layer.open(str(write_layer(tmp_path / "base", size, held)))
        asked.clear()
        dense.sample(MergedView([base]).read, base.extents, base)
        pages_read = len(asked) // 2
        assert pages_read == reads if reads else 100 <= pages_read < 200


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
    real = dense.sample

    def counted(parents: content.Read, below: ExtentList, layer: Layer) -> Pages:
        seen.append((layer.path, operations.opener.hashing.busy))
        return real(parents, below, layer)

    monkeypatch.setattr(dense, "sample", counted)

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
