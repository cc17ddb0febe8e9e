"""Mount options against those of real file systems."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffmergefs.system.mounttable import mount_of
from tests.support import loopfs, skips
from tests.support.descriptors import opened


def test_options_are_those_of_the_filesystem(
    overlay_fs: loopfs.Overlay, filesystem: Callable[[str], Path]
) -> None:
    with opened(overlay_fs.merged) as fd:
        found = mount_of(fd)
        assert found is not None and found.kind == "overlay"
        assert f"upperdir={overlay_fs.upper}" in found.options
        assert (found.root, found.path) == ("/", str(overlay_fs.merged))
        device = os.fstat(fd).st_dev
        assert found.device == f"{os.major(device)}:{os.minor(device)}"
    with opened(filesystem("tmpfs_huge")) as fd:
        found = mount_of(fd)
        assert found is not None and "huge=always" in found.options


@contextmanager
def mounted(point: Path, *arguments: str | Path) -> Iterator[Path]:
    skips.require_mounts()
    point.mkdir()
    subprocess.run(["mount", *arguments, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", point], check=False)


def test_a_part_of_a_filesystem_that_is_mounted_elsewhere(public_path: Path) -> None:
    with mounted(public_path / "whole", "-t", "tmpfs", "tmpfs") as whole:
        (whole / "a b").mkdir()
        with mounted(public_path / "part", "--bind", whole / "a b") as part, opened(part) as fd:
            found = mount_of(fd)
            assert found is not None and (found.root, found.path) == ("/a b", str(part))


def test_paths_with_blanks_and_ends_of_lines(public_path: Path) -> None:
    """mountinfo(5) escapes a newline only; to str.splitlines these end a line too."""
    point = public_path / "a \\\x0b\x1c\x85\u2028\nb"
    with mounted(point, "-t", "tmpfs", "-o", "size=1m", "tmpfs"), opened(point) as fd:
        found = mount_of(fd)
        assert found is not None and found.path == str(point)
        assert found.kind == "tmpfs" and {"rw", "size=1024k"} <= set(found.options)


def test_a_mount_that_is_not_listed_goes_by_another_one_of_the_filesystem(
    public_path: Path,
) -> None:
    with (
        mounted(public_path / "a", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as first,
        mounted(public_path / "b", "--bind", first) as second,
        opened(first) as fd,
    ):
        subprocess.run(["umount", "--lazy", first], check=True)
        found = mount_of(fd)
        assert found is not None and (found.root, found.path, found.kind) == ("", "", "tmpfs")
        assert "size=1024k" in found.options
        subprocess.run(["umount", "--lazy", second], check=True)
        assert mount_of(fd) is None
