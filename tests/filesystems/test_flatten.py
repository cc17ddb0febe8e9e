"""flatten on each file system: what is shared, what is copied, and how much space it needs."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.errors import LayerChangedError, NoSpaceError
from diffmergefs.core.extents import ExtentList
from diffmergefs.writing.flatten import FlattenResult, flatten
from tests.support import mounttable, skips
from tests.support.calls import first
from tests.support.images import PAGE, overlay_oracle, signed
from tests.support.inputs import unchanged
from tests.support.subjects.flatten import (
    ORACLE,
    SIZE,
    VISIBLE,
    Space,
    chain,
    change,
    data_of,
    data_of_view,
    open_view,
    os_error,
    out,
    pages,
    write_chain,
)

__all__ = ["chain", "out"]


def test_each_filesystem(real_fs: Path) -> None:
    paths = write_chain(real_fs)
    out = real_fs / "out"
    fstype = next(
        e.fstype for e in reversed(mounttable.entries()) if real_fs.is_relative_to(e.path)
    )
    with unchanged(paths), open_view(paths) as view:
        data = data_of_view(view)
        result = flatten(view, out, verify=True)
    assert out.read_bytes() == ORACLE
    assert data_of(out) == data
    assert sorted(real_fs.iterdir()) == [*paths, out]
    none, holes = (0, 0, 0), SIZE - sum(VISIBLE)
    if fstype in ("xfs", "btrfs"):
        assert result == FlattenResult(SIZE, none, VISIBLE, holes)
        assert result.reflinked
    else:
        assert result == FlattenResult(SIZE, VISIBLE, none, holes)
        assert not result.reflinked


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_what_is_not_on_whole_blocks_is_copied(
    filesystem: Callable[[str], Path], kind: str
) -> None:
    directory = filesystem(kind)
    # 1000 bytes more than whole pages: the last extent ends with the file and is shared. The cut
    # in page 3 is not on a block; the layers' extents are given, as no filesystem reports one.
    size = 8 * PAGE + 1000
    chain = [
        [(0, signed(0, 0, size))],
        [*pages(1, 3), (8 * PAGE, signed(1, 8 * PAGE, 1000))],
    ]
    paths = write_chain(directory, chain, size)
    with open_view(paths) as view:
        view.layers[1].extents = ExtentList([(3 * PAGE, 3 * PAGE + 512), (8 * PAGE, size)])
        result = flatten(view, directory / "out")
    chain[1][0] = (3 * PAGE, signed(1, 3 * PAGE, 512))
    assert (directory / "out").read_bytes() == overlay_oracle(size, chain)
    assert result.copied == (0, 512)
    assert result.shared == (size - 1512, 1000)


def test_a_base_of_which_nothing_shows_is_not_cloned(
    filesystem: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = filesystem("xfs")
    paths = write_chain(directory, [pages(0, 1), pages(1, 1)])
    asked: list[int] = []
    ioctl = fcntl.ioctl
    monkeypatch.setattr(fcntl, "ioctl", first(lambda _, op, *__: asked.append(op), ioctl))
    with open_view(paths) as view:
        result = flatten(view, directory / "out")
    assert result.shared == (0, PAGE)
    assert 0x40049409 not in asked


def test_layers_on_another_filesystem_are_copied(filesystem: Callable[[str], Path]) -> None:
    layers, directory = filesystem("tmpfs"), filesystem("xfs")
    with open_view(write_chain(layers)) as view:
        result = flatten(view, directory / "out", verify=True)
    assert (directory / "out").read_bytes() == ORACLE
    assert (result.copied, result.reflinked) == (VISIBLE, False)


def test_a_diff_beside_the_output_is_shared_though_the_base_is_elsewhere(
    filesystem: Callable[[str], Path],
) -> None:
    directory = filesystem("btrfs")
    base = write_chain(filesystem("ext4"))[0]
    diffs = write_chain(directory)[1:]
    with open_view([base, *diffs]) as view:
        result = flatten(view, directory / "out")
    assert (directory / "out").read_bytes() == ORACLE
    assert result.copied == (VISIBLE[0], 0, 0)
    assert result.shared == (0, *VISIBLE[1:])


@pytest.mark.parametrize("kind", ["tmpfs", "btrfs"])
def test_writes_to_a_filesystem_that_cannot_be_asked_for_its_space(
    kind: str, filesystem: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a FUSE server without statfs(2)."""
    directory = filesystem(kind)

    def not_known(fd: int) -> None:
        raise os_error(errno.ENOSYS)

    with open_view(write_chain(directory)) as view:
        monkeypatch.setattr(os, "fstatvfs", not_known)
        flatten(view, directory / "whole")
        assert (directory / "whole").read_bytes() == view.read(0, view.size)


def test_needs_no_space_for_what_is_shared(
    filesystem: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = filesystem("btrfs")
    paths = write_chain(directory)
    monkeypatch.setattr(os, "fstatvfs", lambda fd: Space(10**6, 0, PAGE))
    with open_view(paths) as view:
        assert flatten(view, directory / "out").shared == VISIBLE


def test_needs_space_for_the_diffs_beside_a_shared_base(
    filesystem: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, needed = filesystem("btrfs"), sum(VISIBLE[1:])
    base = write_chain(directory)[0]
    diffs = write_chain(filesystem("ext4"))[1:]
    monkeypatch.setattr(os, "fstatvfs", lambda fd: Space(10**6, needed // PAGE - 1, PAGE))
    with open_view([base, *diffs]) as view, pytest.raises(NoSpaceError, match=f" {needed} bytes"):
        flatten(view, directory / "out")


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_shared_layer_that_changes_half_way(
    filesystem: Callable[[str], Path], kind: str, layer: int
) -> None:
    directory = filesystem(kind)
    paths = write_chain(directory)
    with open_view(paths) as view, pytest.raises(LayerChangedError, match=paths[layer].name):
        flatten(view, directory / "out", progress=lambda done: change(str(paths[layer]), "write"))
    assert sorted(directory.iterdir()) == paths


def test_a_base_that_changed_before_it_was_cloned(filesystem: Callable[[str], Path]) -> None:
    directory = filesystem("btrfs")
    paths = write_chain(directory)
    with open_view(paths) as view, pytest.raises(LayerChangedError, match=r"000\.mem"):
        change(str(paths[0]), "write")
        flatten(view, directory / "out", progress=lambda done: pytest.fail("too late"))


@pytest.fixture
def small_fs(public_path: Path) -> Path:
    """A tmpfs of 256 KiB."""
    skips.require_mounts()
    path = public_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize("checked", [True, False])
def test_a_full_filesystem(
    tmp_path: Path, small_fs: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """Also when the space goes away after it was asked for."""
    paths = write_chain(tmp_path, [pages(0, *range(100))], 100 * PAGE)
    if not checked:
        monkeypatch.setattr("diffmergefs.writing.copying.free_bytes", lambda fd: None)
    with open_view(paths) as view, pytest.raises(NoSpaceError) as caught:
        flatten(view, small_fs / "out")
    assert str(caught.value).startswith(f"{small_fs}/out: ")
    assert str(100 * PAGE) in str(caught.value)
    assert list(small_fs.iterdir()) == []
