"""Holes that the page cache makes look like data: exact, or refused until that has passed.

xfs calls a hole data while its pages are cached over space that it has reserved for copy-on-write.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.checks.doctor import examine_path
from diffmergefs.core import sparse
from diffmergefs.core.errors import LayerChangedError, UntrustedExtentsError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.served import Store
from diffmergefs.opening.content import Parents, Verdicts
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy, problems, require_trust
from diffmergefs.sidecars.verified import Remembered
from diffmergefs.writing.diffs import rediff
from diffmergefs.writing.flatten import flatten
from diffmergefs.writing.sealing import seal_layer
from tests.support import loopfs
from tests.support.calls import first
from tests.support.commands import as_user, diffmergefs
from tests.support.fiemap import around_map
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.layers import poke, written
from tests.support.live import error_of, until
from tests.support.mounts import mounted
from tests.support.reserved import DATA, NEW, OLD, SIZE, mapped, write_again, write_reserved
from tests.support.stores import OLD_NS, SECOND_NS, age, write_tag
from tests.support.users import NOBODY

BASE = [(0, signed(0, 0, SIZE))]
ORACLE = overlay_oracle(SIZE, [BASE, NEW])
PAST = f"{SIZE - len(DATA) * PAGE} bytes from {PAGE} on are reported as data, but nothing"


@pytest.fixture
def place(filesystem: Callable[[str], Path]) -> Path:
    return filesystem("xfs")


@pytest.fixture
def diff(place: Path) -> Path:
    return write_reserved(place / "diff")


@pytest.fixture
def base(place: Path) -> Path:
    return write_layer(place / "base", SIZE, BASE)


def reported(path: Path) -> ExtentList:
    with path.open("rb") as file:
        return ExtentList(sparse.data_extents(file.fileno(), SIZE))


def times(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_blocks


def everything(layer: Layer) -> bytearray:
    return MergedView([layer]).read(0, layer.size)


def test_what_only_the_cache_made_data_is_a_hole(base: Path, diff: Path) -> None:
    # The reason: SEEK_DATA calls all of it data, and the block count bears it out.
    assert reported(diff) == ExtentList([(0, SIZE)])
    assert diff.stat().st_blocks * 512 >= SIZE
    before = times(diff)
    image = open_chain(base, [diff])
    assert list(image.view.layers[1].extents) == DATA and not image.dense
    assert image.view.read(0, SIZE) == ORACLE
    assert times(diff) == before


def test_a_flatten_that_shared_the_blocks_leaves_such_a_diff_too(base: Path, place: Path) -> None:
    diff = write_layer(place / "diff", SIZE, OLD)
    with open_chain(base, [diff]).view as view:
        assert flatten(view, place / "flat").shared
    write_again(diff)
    diff.read_bytes()
    assert reported(diff) != ExtentList(DATA)
    with open_chain(base, [diff]).view as view:
        assert view.read(0, SIZE) == ORACLE


def test_while_somebody_maps_it_it_is_refused_and_no_longer(base: Path, diff: Path) -> None:
    with mapped(diff):
        with pytest.raises(UntrustedExtentsError, match=PAST) as caught:
            open_chain(base, [diff])
        assert caught.value.check == "map" and caught.value.is_passing
        assert "as long as someone maps" in str(caught.value) and "\n" not in str(caught.value)
        # Not even as a complete image, which it looks like.
        with pytest.raises(UntrustedExtentsError, match=PAST):
            open_chain(base, [diff], TrustPolicy(dense=True))
        policy = TrustPolicy(trust_grain={"map"}, dense=True)
        (line,) = open_chain(base, [diff], policy).overridden
        assert "overrides the check of map: " in line
        assert diffmergefs("info", "--base", base, "--diff", diff).returncode == 5
    assert open_chain(base, [diff]).view.read(0, SIZE) == ORACLE


def test_a_seal_is_of_what_is_stored(diff: Path, base: Path) -> None:
    with mapped(diff), pytest.raises(UntrustedExtentsError, match=PAST):
        seal_layer(diff)
    assert not Path(f"{diff}.bmap").exists()
    assert seal_layer(diff).data_bytes == len(DATA) * PAGE
    with mapped(diff):  # the seal says what is data
        assert open_chain(base, [diff]).view.read(0, SIZE) == ORACLE


@pytest.mark.parametrize("is_mapped", [False, True])
def test_an_open_layer_stays_right_and_is_not_lost(
    is_mapped: bool, diff: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.utime(diff, ns=(10**9, 10**9))
    layer = Layer.open(str(diff))
    diff.read_bytes()
    if is_mapped:
        with mapped(diff):
            diff.chmod(0o600)
            assert everything(layer) == overlay_oracle(SIZE, [NEW])
    else:
        diff.chmod(0o600)
        assert everything(layer) == overlay_oracle(SIZE, [NEW])
    assert list(layer.extents) == DATA and layer.is_unchanged()
    (record,) = caplog.records
    said = "became written zeros: still as it was" if is_mapped else "the same extents"
    assert record.levelno == logging.INFO and said in record.getMessage()


def test_a_base_that_was_opened_while_it_was_mapped_is_not_lost_afterwards(diff: Path) -> None:
    with mapped(diff):
        layer = Layer.open(str(diff))
        assert layer.extents == ExtentList([(0, SIZE)])  # zeros either way
        assert layer.unmapped.data_bytes == SIZE - len(DATA) * PAGE
    diff.chmod(0o600)
    assert everything(layer) == overlay_oracle(SIZE, [NEW])
    # What was stored there may not go.
    status = diff.stat()
    subprocess.run(["fallocate", "-p", "-o", "0", "-l", str(PAGE), diff], check=True)
    os.utime(diff, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(LayerChangedError, match="data extents are gone"):
        everything(layer)


def test_holes_are_not_shared_as_the_zeros_that_they_look_like(place: Path) -> None:
    """`rediff` writes zeros where its child has holes, mapped or not."""
    parent = write_layer(place / "parent", SIZE, BASE)
    child = write_reserved(place / "child")
    with mapped(child):
        old, new = (MergedView([Layer.open(str(path))]) for path in (parent, child))
        result = rediff(old, new, place / "out", verify=True).written
    assert result.dense and result.shared == 0
    assert reported(place / "out") == ExtentList([(0, SIZE)])


def test_a_store_asks_again_at_each_look_without_a_walk(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(logging.getLogger("diffmergefs"), "propagate", True)
    root = place / "store"
    age(write_layer(write_tag(root, "base", size=SIZE) / "memory.bin", SIZE, BASE))
    for tag, parent in (("work", "base"), ("leaf", "work")):
        folder = write_tag(root, tag, parent, size=SIZE)
        if tag == "work":
            (folder / "memory.bin").unlink()
            age(write_reserved(folder / "memory.bin"))
    store = Store(str(root), TrustPolicy(), clock=lambda: OLD_NS + 100 * SECOND_NS)
    store.look()
    walks: list[int] = []
    walk = sparse.walk

    def counted(fd: int, size: int) -> sparse.Walk:
        walks.append(fd)
        return walk(fd, size)

    monkeypatch.setattr(sparse, "walk", counted)
    before = times(root / "work" / "memory.bin")
    with mapped(root / "work" / "memory.bin"):
        for tag in ("work", "leaf"):
            with pytest.raises(UntrustedExtentsError, match=f"^work/memory.bin: .*{PAST}"):
                store.open(tag)
        done = len(walks)
        for _ in range(3):
            store.look()
            for tag in ("work", "leaf"):
                with pytest.raises(UntrustedExtentsError):
                    store.opened(tag)
        assert len(walks) == done
    caplog.clear()
    store.look()
    gone = "no layer of it is known to be with holes that look like data any more"
    assert sorted(caplog.messages) == [f"leaf: {gone}", f"work: {gone}"]
    assert store.open("work").view.read(0, SIZE) == ORACLE
    assert store.open("leaf") and times(root / "work" / "memory.bin") == before


def test_a_mounted_tag_comes_when_nobody_maps_its_diff_any_more(
    place: Path, mountpoint: Path
) -> None:
    root = place / "store"
    age(write_layer(write_tag(root, "base", size=SIZE) / "memory.bin", SIZE, BASE))
    memory = write_tag(root, "work", "base", size=SIZE) / "memory.bin"
    memory.unlink()
    age(write_reserved(memory))
    before = times(memory)
    shown = mountpoint / "work" / "memory.bin"
    with mounted(root, mountpoint, expect_log=("its memory file is not shown: ",)) as mount:
        with mapped(memory):
            assert error_of(shown) == errno.EIO
            assert PAST in mount.log()
        until(lambda: error_of(shown) is None, "the tag's memory file does not come")
        assert shown.read_bytes() == ORACLE
        assert mount.log().count("its memory file is not shown") == 1
    assert times(memory) == before


def test_doctor_names_the_cause(diff: Path) -> None:
    with mapped(diff):
        found = [finding for finding in examine_path(str(diff)) if finding.severity == "wrong"]
    assert [finding.check for finding in found] == ["map", "dense"]
    assert PAST in found[0].finding and "try again" in found[0].remedy
    assert not [finding for finding in examine_path(str(diff)) if finding.severity == "wrong"]


def test_who_may_only_read_it_drops_cached_holes_too(public_path: Path) -> None:
    with loopfs.made("xfs", public_path) as folder:
        base, diff = write_layer(folder / "base", SIZE, BASE), write_reserved(folder / "diff")
        for path in (base, diff):
            path.chmod(0o644)
        done = as_user(NOBODY, NOBODY, ["info", "--json", "--base", base, "--diff", diff])
    assert done.returncode == 0
    assert json.loads(done.stdout)["layers"][1]["data_bytes"] == len(DATA) * PAGE


def test_what_pages_tell_is_remembered_of_the_extents_that_were_read(
    diff: Path, tmp_path: Path
) -> None:
    """With a check overridden they depend on the cache, and no time stamp does."""
    verdicts = Verdicts(Remembered(str(tmp_path)))
    looked: list[int] = []

    def look(layer: Layer) -> Callable[[], tuple[int, ...]]:
        return first(lambda: looked.append(layer.extents.data_bytes), lambda: (1,))

    with mapped(diff):
        filled = Layer.open(str(diff))
    exact = Layer.open(str(diff))
    assert filled.fingerprint == exact.fingerprint
    for layer in (filled, exact, filled, exact):
        assert verdicts.of("kind", Parents(), layer, look(layer)) == (1,)
    assert looked == [SIZE, len(DATA) * PAGE]


def test_a_layer_that_a_base_holds_open_is_walked_again_for_a_diff(place: Path) -> None:
    """One file under two tags, once as a base: it was mapped when that one opened it."""
    root = place / "store"
    age(write_layer(write_tag(root, "base", size=SIZE) / "memory.bin", SIZE, BASE))
    shared = write_tag(root, "twin", size=SIZE) / "memory.bin"
    shared.unlink()
    age(write_reserved(shared))
    memory = write_tag(root, "work", "base", size=SIZE) / "memory.bin"
    memory.unlink()
    os.link(shared, memory)
    store = Store(str(root), TrustPolicy(), clock=lambda: OLD_NS + 100 * SECOND_NS)
    store.look()
    with mapped(shared):
        twin = store.open("twin")
    assert store.open("work").view.read(0, SIZE) == ORACLE
    assert twin.view.read(0, SIZE) == overlay_oracle(SIZE, [NEW])


@pytest.mark.parametrize("moment", ["before the map", "between the two", "after the data"])
def test_a_store_during_the_comparison_is_seen(
    moment: str, real_fs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the fingerprint, which was taken before: whatever the two answers are."""
    path = written(real_fs)
    os.utime(path, ns=(10**9, 10**9))
    walk = sparse.data_extents

    def store_at(this: str) -> None:
        if moment == this:
            poke(path, 0, b"new")

    def then(fd: int, size: int) -> Any:
        found = list(walk(fd, size))
        store_at("after the data")
        return iter(found)

    around_map(monkeypatch, lambda: store_at("before the map"), lambda: store_at("between the two"))
    monkeypatch.setattr(sparse, "data_extents", then)
    layer = Layer.open(str(path))
    with pytest.raises(LayerChangedError, match="mtime"):
        everything(layer)


def test_what_is_stored_and_yet_a_hole_is_refused(
    real_fs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(real_fs)
    kept = [(2 * PAGE, 3 * PAGE)]
    stored = sparse.walk(os.open(path, os.O_RDONLY), path.stat().st_size).data
    monkeypatch.setattr(sparse, "data_extents", lambda fd, size: iter(kept))
    found = list(problems(Layer.open(str(path)), PAGE))
    if real_fs.parent.name == "tmpfs":  # it has no map
        assert found == []
        return
    (problem,) = found
    assert problem.check == "map" and "is reported as a hole, but" in problem.text
    assert next(iter(stored)) == (2 * PAGE, 4 * PAGE)
    assert f"[{3 * PAGE}, {4 * PAGE}) is" in problem.text


HEALTHY = {
    "pages": (1 << 20, [(PAGE, signed(1, PAGE, PAGE)), (600 << 10, bytes(PAGE))]),
    "side by side": (1 << 20, [(n * PAGE, signed(1, n * PAGE, PAGE)) for n in (8, 7, 6, 5, 9)]),
    "all": (64 * PAGE, [(0, signed(1, 0, 64 * PAGE))]),
    "nothing": (1 << 20, []),
    "tail": (2 * PAGE + 100, [(2 * PAGE, b"x" * 100)]),
    "one small file": (100, [(0, b"x" * 100)]),
    "small": (600, [(0, b"x" * 600)]),
    "zeros to compress": (4 << 20, [(1 << 20, bytes(1 << 20)), (3 << 20, bytes(PAGE))]),
}
ODD_KINDS = ["ext4_bigalloc", "ext4_inline", "ext4_1k", "ext3", "xfs16k", "overlay", "zstd"]


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", *ODD_KINDS])
def test_a_healthy_file_is_as_its_map_says(
    kind: str, name: str, filesystem: Callable[[str], Path]
) -> None:
    place = filesystem("btrfs" if kind == "zstd" else kind)
    if kind == "zstd":
        os.setxattr(place, "btrfs.compression", b"zstd")
    size, extents = HEALTHY[name]
    path = write_layer(place / "file", size, extents)
    for read in (False, True, True):
        layer = Layer.open(str(path))
        assert (list(layer.unmapped), list(layer.unreported)) == ([], [])
        assert "map" not in [problem.check for problem in problems(layer, PAGE)]
        if read:
            path.read_bytes()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_shared_blocks_written_again_on_any_filesystem(
    kind: str, filesystem: Callable[[str], Path]
) -> None:
    place = filesystem(kind)
    path = write_layer(place / "diff", SIZE, OLD)
    share = "--reflink=auto" if kind == "ext4" else "--reflink=always"
    subprocess.run(["cp", share, path, place / "copy"], check=True)
    for each in (path, place / "copy"):
        write_again(each)
        each.read_bytes()
        layer = Layer.open(str(each))
        assert list(layer.extents) == DATA and require_trust(layer, TrustPolicy()) == []
