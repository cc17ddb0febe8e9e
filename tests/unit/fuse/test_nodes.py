"""Inode numbers, the kernel's lookups of them, and the extended attributes of an image."""

from __future__ import annotations

import errno
import gc
import json
from pathlib import Path

import pytest

from diffmergefs.fuse.access import Access
from diffmergefs.fuse.nodes import (
    LONGEST_XATTR,
    ROOT_INODE,
    Inodes,
    MemoryFile,
    OpenImage,
    Root,
    StatusFile,
    StatusFolder,
    TagFolder,
    lane_of,
    lane_of_node,
)
from diffmergefs.opening.images import open_chain
from tests.support.images import PAGE, signed, write_layer

OURS = Access(0, 0, 0o400)


def image_in(folder: Path) -> OpenImage:
    base = write_layer(folder / "base", 4 * PAGE, [(0, signed(0, 0, 3 * PAGE))])
    diff = write_layer(folder / "diff", 4 * PAGE, [(2 * PAGE, signed(1, 2 * PAGE, 2 * PAGE))])
    return OpenImage.of(open_chain(base, [diff]).view, "memory", OURS)


def require_stale(inodes: Inodes, number: int) -> None:
    with pytest.raises(OSError, match=f"inode {number}") as caught:
        inodes.node(number)
    assert caught.value.errno == errno.ESTALE


def test_equal_nodes_share_a_number_until_it_is_forgotten() -> None:
    inodes = Inodes()
    number = inodes.number(TagFolder("a", 1, 2))
    assert inodes.number(TagFolder("a", 1, 2)) == number
    assert len({number, inodes.number(TagFolder("a", 1, 3)), ROOT_INODE}) == 3
    inodes.forget(number)
    require_stale(inodes, number)
    assert inodes.number(TagFolder("a", 1, 2)) > number


def test_a_node_stays_until_the_kernel_takes_back_its_last_lookup() -> None:
    inodes = Inodes()
    number = inodes.number(StatusFolder())
    for _ in range(3):
        inodes.look_up(number)
    inodes.forget(number, 2)
    assert inodes.node(number) == StatusFolder()
    inodes.forget(number, 1)
    require_stale(inodes, number)


def test_the_root_is_there_before_and_after_it_is_forgotten() -> None:
    inodes = Inodes()
    inodes.forget(ROOT_INODE)
    assert inodes.node(ROOT_INODE) == Root()
    assert inodes.number(Root()) == ROOT_INODE


def test_an_image_keeps_its_number_and_the_number_keeps_no_image(tmp_path: Path) -> None:
    inodes = Inodes()
    image = image_in(tmp_path)
    number = inodes.number(MemoryFile(image))
    assert inodes.node(number) == MemoryFile(image)
    inodes.forget(number)
    assert inodes.number(MemoryFile(image)) == number
    assert inodes.open_images() == 1
    image.view.close()
    del image
    gc.collect()
    require_stale(inodes, number)
    assert inodes.open_images() == 0


def test_extended_attributes_tell_the_chain(tmp_path: Path) -> None:
    image = image_in(tmp_path)
    with image.view:
        chain, layers, dirty = (image.xattr("/store", name) for name in OpenImage.XATTRS)
        assert json.loads(chain) == [
            {"path": str(tmp_path / "base"), "data_bytes": 3 * PAGE},
            {"path": str(tmp_path / "diff"), "data_bytes": 2 * PAGE},
        ]
        assert (layers, dirty) == (b"2", b"%d" % (2 * PAGE))
        assert image.visible == 4 * PAGE
        image.view.layers[0].path = "x" * LONGEST_XATTR
        with pytest.raises(OSError, match="chain") as caught:
            image.xattr("/store", OpenImage.XATTRS[0])
        assert caught.value.errno == errno.E2BIG


def test_work_on_one_filesystem_shares_a_lane(tmp_path: Path) -> None:
    image = image_in(tmp_path)
    with image.view:
        device = image.view.layers[0].key.device
        assert lane_of_node(MemoryFile(image)) == lane_of(device)
        assert lane_of_node(TagFolder("a", device, 1)) == lane_of(device)
    assert lane_of_node(TagFolder("a", device + 1, 1)) != lane_of(device)
    assert lane_of_node(Root()) not in (lane_of(device), lane_of_node(StatusFile("x")))


def test_each_change_of_lookups_is_recorded(tmp_path: Path) -> None:
    inodes = Inodes()
    records: list[tuple[int, object, int]] = []
    inodes.recorded = lambda number, node, lookups: records.append((number, node, lookups))
    folder = TagFolder("a", 1, 2)
    number = inodes.number(folder)
    inodes.forget(number)
    assert not records, "the kernel does not know it"
    number = inodes.number(folder)
    for _ in range(3):
        inodes.look_up(number)
    inodes.forget(number, 2)
    inodes.forget(number, 1)
    assert [lookups for _, _, lookups in records] == [1, 2, 3, 1, 0]
    assert records[0] == (number, folder, 1) and records[-1] == (number, None, 0)


def test_a_number_is_restored_with_its_lookups(tmp_path: Path) -> None:
    inodes = Inodes()
    image, folder = image_in(tmp_path), TagFolder("a", 1, 2)
    with image.view:
        inodes.restore(70, folder, 2)
        inodes.restore(50, MemoryFile(image), 1)
        assert inodes.fresh == 71
        assert (inodes.number(folder), inodes.number(MemoryFile(image))) == (70, 50)
        assert inodes.node(70) == folder and inodes.node(50) == MemoryFile(image)
        assert sorted(inodes.known(), key=lambda each: each[0]) == [
            (50, MemoryFile(image), 1),
            (70, folder, 2),
        ]
        assert inodes.number(TagFolder("b", 1, 2)) == 71 and inodes.fresh == 72
        inodes.forget(70, 2)
        require_stale(inodes, 70)
        assert list(inodes.known()) == [(50, MemoryFile(image), 1)]
    del image
    gc.collect()
    require_stale(inodes, 50)
    assert list(inodes.known()) == []


def test_the_root_can_be_restored() -> None:
    inodes = Inodes()
    inodes.restore(ROOT_INODE, Root(), 4)
    assert list(inodes.known()) == [(ROOT_INODE, Root(), 4)]
    assert inodes.fresh == ROOT_INODE + 1
