"""A mount over the store that another mount serves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from diffmergefs.core.errors import FileAccessError
from tests.support import skips
from tests.support.mounts import mounted
from tests.support.stores import write_chain
from tests.support.subjects.served import looked, root

__all__ = ["root"]


def test_a_diffmergefs_over_the_directory_is_not_looked_into(
    public_path: Path, mountpoint: Path
) -> None:
    write_chain(public_path / "store", ["base"])
    store = looked(mountpoint)
    with mounted(public_path / "store", mountpoint):
        with pytest.raises(FileAccessError) as caught:
            store.look()
        assert str(caught.value) == f"{mountpoint}: a diffmergefs was mounted over it"
    store.look()
    assert store.tags() == []


def test_a_filesystem_mounted_over_the_directory_is_followed(public_path: Path) -> None:
    skips.require_mounts()
    root = write_chain(public_path / "store", ["base", "leaf"])
    store = looked(root)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(root)], check=True, timeout=60)
    try:
        write_chain(root, ["new"])
        store.look()
        assert store.tags() == ["new"]
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True, timeout=60)
    store.look()
    assert set(store.tags()) == {"base", "leaf"}
