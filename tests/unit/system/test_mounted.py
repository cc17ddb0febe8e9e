"""Mounts of ours, as the mount table has them. Real ones are unmounted in tests/mount."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffmergefs.core.errors import MountpointError
from diffmergefs.system import mounttable
from diffmergefs.system.mounted import OwnMount, detach, mount_at, mounts_of, unmount
from diffmergefs.system.mounttable import FILESYSTEM_TYPE, Mount


@pytest.fixture
def root_mount() -> Mount:
    found = mounttable.mount_entry("/")
    assert found is not None
    return found


def test_another_mount_or_none_is_not_ours(tmp_path: Path, root_mount: Mount) -> None:
    for call in (mount_at, unmount):
        with pytest.raises(MountpointError) as caught:
            call("/")
        assert str(caught.value) == (
            f"/: not a diffmergefs mount point, but a mount of type {root_mount.kind};"
            " `diffmergefs status` lists the mounts"
        )
        with pytest.raises(MountpointError) as caught:
            call(str(tmp_path))
        assert str(caught.value).startswith(f"{tmp_path}: not a diffmergefs mount point; ")


def test_all_that_is_listed_is_ours() -> None:
    assert all(entry.kind == FILESYSTEM_TYPE for entry in mounts_of(None))
    assert mounts_of(2**31) == []  # a user without mounts


def test_where_nothing_is_mounted_nothing_is_detached(tmp_path: Path) -> None:
    with pytest.raises(MountpointError, match="cannot be unmounted: ") as caught:
        detach(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: ")


def test_an_own_mount_that_is_gone_has_no_obstacle(root_mount: Mount) -> None:
    gone = OwnMount(replace(root_mount, number=2**31, device="0:999999", source="/gone"))
    assert (gone.obstacle(), gone.detach(), gone.elsewhere()) == ("", "", [])
    assert not gone.is_shown() and not gone.is_known()


def test_an_own_mount_is_found_by_its_number(root_mount: Mount) -> None:
    own = OwnMount(root_mount)
    assert own.is_shown()
    assert root_mount.path not in own.elsewhere()
