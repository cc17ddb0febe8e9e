"""How large and how deep: 16 TiB and 1,000 layers work, more is refused in one line."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffmergefs.analysis.info import describe
from diffmergefs.core.errors import BrokenChainError, SizeMismatchError
from diffmergefs.core.layer import MAX_SIZE, Layer
from diffmergefs.opening.images import open_chain, open_image
from diffmergefs.opening.opener import raise_descriptor_limit
from diffmergefs.stores.catalog import read_catalog
from diffmergefs.writing.flatten import flatten
from tests.support.commands import mistake, succeed
from tests.support.images import PAGE, signed, write_layer
from tests.support.mounts import mounted
from tests.support.stores import pages, write_document, write_numbered, write_tag

MIDDLE = MAX_SIZE // 2
LAST = MAX_SIZE - PAGE


@pytest.fixture(params=["xfs", "btrfs", "tmpfs"])
def large_files(
    request: pytest.FixtureRequest, filesystem: Callable[[str], Path]
) -> Iterator[Path]:
    """A directory on each file system that takes files of 16 TiB (ext4 ends a block before)."""
    path = filesystem(request.param)
    yield path
    shutil.rmtree(path)


def write_giant(directory: Path, size: int = MAX_SIZE) -> Path:
    """A base that holds its first and its last page, and a diff over the middle and the last."""
    last = size - PAGE
    write_tag(directory, "base", size=size, numbers=[])
    write_tag(directory, "work", "base", size=size, numbers=[])
    for layer, tag, offsets in ((0, "base", [0, last]), (1, "work", [MIDDLE, last])):
        extents = [(offset, signed(layer, offset, PAGE)) for offset in offsets]
        write_layer(directory / tag / "memory.bin", size, extents)
    return directory / "work"


EXPECTED = {
    0: signed(0, 0, PAGE),
    PAGE: bytes(PAGE),
    MIDDLE - PAGE: bytes(PAGE),
    MIDDLE: signed(1, MIDDLE, PAGE),
    LAST: signed(1, LAST, PAGE),
}


def test_sixteen_tebibytes_are_opened_read_described_and_flattened(large_files: Path) -> None:
    with open_image(write_giant(large_files)).view as view:
        assert view.size == 1 << 44
        assert {offset: bytes(view.read(offset, PAGE)) for offset in EXPECTED} == EXPECTED
        assert bytes(view.read(LAST + PAGE - 1, 100)) == signed(1, LAST, PAGE)[-1:]
        flatten(view, large_files / "whole")
    facts = describe(open_chain(large_files / "whole"))
    assert (facts.size, facts.layers[0].data_bytes) == (MAX_SIZE, 3 * PAGE)
    whole = Layer.open(str(large_files / "whole"))
    for offset, expected in EXPECTED.items():
        found = bytearray(PAGE)
        whole.read_into(memoryview(found), offset)
        assert bytes(found) == expected
    whole.close()


def test_sixteen_tebibytes_are_mounted(filesystem: Callable[[str], Path], mountpoint: Path) -> None:
    directory = filesystem("tmpfs")
    write_giant(directory / "store")
    view = mountpoint / "work" / "memory.bin"
    with mounted(directory / "store", mountpoint), view.open("rb", buffering=0) as file:
        assert os.fstat(file.fileno()).st_size == MAX_SIZE
        found = {offset: os.pread(file.fileno(), PAGE, offset) for offset in EXPECTED}
    assert found == EXPECTED


@pytest.mark.parametrize("size", [MAX_SIZE + 1, (1 << 63) - 1])
def test_a_larger_file_is_refused_in_one_line(filesystem: Callable[[str], Path], size: int) -> None:
    store = filesystem("xfs")
    write_tag(store, "base", size=size, numbers=[])
    write_tag(store, "work", "base", size=size, numbers=[])
    expected = f"memory.bin: {size} bytes, more than the 17592186044416 (16 TiB) that an image"
    with pytest.raises(SizeMismatchError) as caught:
        read_catalog(str(store)).chain("work")
    assert str(caught.value).startswith(f"base/{expected}")
    base = store / "base" / "memory.bin"
    with pytest.raises(SizeMismatchError) as refused:
        Layer.open(str(base))
    assert str(refused.value).startswith(f"{base.parent}/{expected}")
    assert expected in mistake(4, "info", "--base", base)
    states = json.loads(succeed("list", "--json", store))
    assert all(expected in state["reason"] for state in states)


@pytest.fixture
def descriptors() -> Iterator[None]:
    """As many descriptors as the command line lets itself have."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_descriptor_limit()
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def write_deep(store: Path, depth: int) -> None:
    """A forkd store whose chain t0, t1, ... is so deep; layer n holds page n of 16."""
    for n in range(depth):
        write_tag(store, f"t{n}", f"t{n - 1}" if n else None, layer=n, vmstate=None)


def deepest() -> dict[int, bytes]:
    # Page p is of the newest layer n <= 999 with n % 16 == p; no diff of 999 is newer than 999.
    newest = {p: max(n for n in range(1000) if n % 16 == p) for p in range(16)}
    return {p: signed(n, p * PAGE, PAGE) for p, n in newest.items()}


@pytest.mark.usefixtures("descriptors")
def test_a_thousand_layers_work_and_one_more_is_refused(tmp_path: Path) -> None:
    write_deep(tmp_path, 1001)
    with open_image(tmp_path / "t999").view as view:
        assert len(view.layers) == 1000
        assert {p: bytes(view.read(p * PAGE, PAGE)) for p in range(16)} == deepest()
    expected = "the chain has more than 1000 layers; squash some"
    with pytest.raises(BrokenChainError, match=expected):
        open_image(tmp_path / "t1000")
    assert expected in mistake(3, "info", tmp_path / "t1000")


@pytest.mark.usefixtures("descriptors")
def test_a_thousand_numbered_layers_work_and_one_more_is_refused(tmp_path: Path) -> None:
    names = [f"{n:04}-t{n}.mem" for n in range(1001)]
    write_numbered(tmp_path, names)
    with open_image(tmp_path / names[999]).view as view:
        assert {p: bytes(view.read(p * PAGE, PAGE)) for p in range(16)} == deepest()
    with pytest.raises(BrokenChainError, match="more than 1000 layers"):
        open_image(tmp_path / names[1000])


@pytest.mark.usefixtures("descriptors")
def test_a_thousand_explicit_layers_work_and_one_more_is_refused(
    filesystem: Callable[[str], Path],
) -> None:
    folder = filesystem("tmpfs")  # which syncs at once
    base = write_layer(folder / "base", 16 * PAGE, pages(0, range(15)))
    diffs = [write_layer(folder / f"{n}", 16 * PAGE, pages(1, [1])) for n in range(1000)]
    with open_chain(base, diffs[1:]).view as view:
        assert bytes(view.read(0, 2 * PAGE)) == signed(0, 0, PAGE) + signed(1, PAGE, PAGE)
    with pytest.raises(BrokenChainError, match="a chain of 1001 layers; 1 to 1000 can be"):
        open_chain(base, diffs)


def test_a_cycle_is_named_tag_by_tag_and_leaves_the_others_alone(tmp_path: Path) -> None:
    write_tag(tmp_path, "fine")
    for tag, parent in (("a", "c"), ("b", "a"), ("c", "b"), ("child", "a"), ("self", "self")):
        write_tag(tmp_path, tag, parent)
    states = {row["tag"]: row for row in json.loads(succeed("list", "--json", tmp_path))}
    assert states.pop("fine")["state"] == "complete"
    cycles = {tag: row["reason"].partition(",")[0] for tag, row in states.items()}
    assert cycles == {
        "a": "cycle: a -> c -> b -> a",
        "b": "cycle: b -> a -> c -> b",
        "c": "cycle: c -> b -> a -> c",
        "child": "cycle: a -> c -> b -> a",
        "self": "cycle: self -> self",
    }
    write_document(tmp_path, "a", '{"memory": "memory.bin"}')
    assert len(read_catalog(str(tmp_path)).chain("c")) == 3
