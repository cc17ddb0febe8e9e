"""Where diffmergefs mounts, and where it refuses to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from diffmergefs.core.errors import MountpointError
from diffmergefs.system.mountpoint import check_mountpoint, resolved
from tests.support import mounttable, skips
from tests.support.mounts import mounted
from tests.support.subjects.mountpoint import REFUSED, root

__all__ = ["root"]


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, root: Path) -> None:
    name, source, layer, text = REFUSED[case]
    mountpoint = os.path.join(root, name)
    layers = [os.path.join(root, layer)] if layer else []
    with pytest.raises(MountpointError) as caught:
        check_mountpoint(mountpoint, os.path.join(root, source) if source else None, layers)
    message = str(caught.value)
    assert message.startswith(f"{mountpoint}: {text.format(root)}")
    assert "\n" not in message


@pytest.mark.parametrize("name", ["mnt", "mnt/", "./store/../mnt", "free"])
def test_accepted(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "free").symlink_to("mnt")
    monkeypatch.chdir(root)
    assert check_mountpoint(name, "store", []) == str(root / "mnt")
    assert check_mountpoint(name, None, ["store/base/memory.bin"]) == str(root / "mnt")
    assert resolved(name) == str(root / "mnt")


def test_a_neighbour_whose_name_begins_the_same_is_not_inside(root: Path) -> None:
    (root / "store-views").mkdir()
    assert check_mountpoint(str(root / "store-views"), str(root / "store"), [])


def test_an_empty_mount_of_another_type_is_a_directory_like_others(root: Path) -> None:
    skips.require_mounts()
    point = root / "mnt"
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(point)], check=True, timeout=60)
    with mounted(root / "store", point):
        assert sorted(os.listdir(point)) == ["base", "leaf"]
    assert [entry.fstype for entry in mounttable.at(str(point))] == ["tmpfs"]
