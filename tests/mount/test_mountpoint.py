"""Mountpoints that are accepted and refused by real mounts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.errors import MountpointError
from diffmergefs.system.mounted import unmount
from diffmergefs.system.mountpoint import check_mountpoint
from diffmergefs.system.mounttable import mount_entry
from tests.support import mounttable, skips
from tests.support.mounts import mounted
from tests.support.stores import write_chain
from tests.support.subjects.mountpoint import REFUSED, root

__all__ = ["root"]


@pytest.mark.parametrize("how", ["mnt", "free"])
def test_mounted_already(how: str, root: Path) -> None:
    (root / "free").symlink_to("mnt")
    with mounted(root / "store", root / "mnt"):
        with pytest.raises(MountpointError) as caught:
            check_mountpoint(str(root / how), str(root / "store"), [])
        assert str(caught.value) == f"{root / how}: {root}/store is mounted there already"
        entry = mount_entry(str(root / "mnt"))
        assert entry and (entry.kind, entry.source) == ("fuse.diffmergefs", f"{root}/store")
        assert mount_entry(str(root)) is None


def test_inside_our_own_mount(root: Path) -> None:
    with mounted(root / "store", root / "mnt"), pytest.raises(MountpointError, match="not empty"):
        check_mountpoint(str(root / "mnt" / "base"), str(root / "store"), [])


ODD_NAMES = [
    *("with blank", "tab\there", "new\nline", "back\\slash", "c,omma", "#hash", "naïve 名前"),
    os.fsdecode(b"no utf-8 \xff"),
    "a, b\\, é",
    "lines\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(name: str, root: Path) -> None:
    source, point = root / f"{name} source", root / name
    (root / "store").rename(source)
    point.mkdir()
    with mounted(source, point) as mount:
        assert sorted(os.listdir(point)) == ["base", "leaf"]
        entry = mount_entry(str(point))
        assert entry and (entry.kind, entry.source) == ("fuse.diffmergefs", str(source))
        assert mount_entry("/") is not None  # whose line is another one
        unmount(str(point))
        assert mount_entry(str(point)) is None
        assert mount.process.wait(60) == 0


@pytest.mark.parametrize("case", ["missing", "file", "full", "source", "above source"])
@pytest.mark.parametrize("options", [(), ("-f",)], ids=["background", "foreground"])
def test_the_command_says_it_in_one_line(case: str, options: tuple[str, ...], root: Path) -> None:
    name, _, _, text = REFUSED[case]
    command = [sys.executable, "-m", "diffmergefs", "mount", "--log", str(root / "log"), *options]
    done = subprocess.run(
        [*command, str(root / "store"), os.path.join(root, name).rstrip("/")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if case == "file":
        text = "is inside the source {}/store; mount it elsewhere"
    assert done.returncode == MountpointError.exit_code
    assert text.format(root) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not mounttable.at(str(root / "mnt"))


def test_a_source_that_is_a_mount_is_no_obstacle(
    root: Path, filesystem: Callable[[str], Path]
) -> None:
    """The mountpoint may lie on the same file system as the source, beside it."""
    folder = filesystem("tmpfs")
    store = write_chain(folder / "store", ["base"])
    (folder / "mnt").mkdir()
    with mounted(store, folder / "mnt"):
        assert os.listdir(folder / "mnt") == ["base"]


def test_an_empty_mount_of_another_type_is_a_directory_like_others(root: Path) -> None:
    skips.require_mounts()
    point = root / "mnt"
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(point)], check=True, timeout=60)
    with mounted(root / "store", point):
        assert sorted(os.listdir(point)) == ["base", "leaf"]
    assert [entry.fstype for entry in mounttable.at(str(point))] == ["tmpfs"]
