"""Where diffmergefs mounts, and where it refuses to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.core.errors import MountpointError
from diffmergefs.system.mountpoint import check_mountpoint
from diffmergefs.system.mounttable import resolved
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
