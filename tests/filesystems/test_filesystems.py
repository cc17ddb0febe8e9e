"""The filesystems that are trusted to report holes exactly: each on the list, all others not."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffmergefs.core import sparse
from diffmergefs.opening import filesystems
from diffmergefs.opening.filesystems import overlay_directories, untrusted_filesystem
from diffmergefs.system.mounttable import mount_of
from tests.support import loopfs, mounttable
from tests.support.commands import as_user
from tests.support.images import PAGE, write_layer
from tests.support.subjects.filesystems import FINE, as_mount, page, reason, shmem_enabled
from tests.support.users import NOBODY

__all__ = ["as_mount", "shmem_enabled"]


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay"])
def test_those_on_the_list_are_trusted(kind: str, filesystem: Callable[[str], Path]) -> None:
    directory = filesystem(kind)
    assert reason(page(directory)) is FINE and reason(directory) is FINE


def test_an_overlay_without_a_listed_mount_goes_by_what_it_passes_through(
    monkeypatch: pytest.MonkeyPatch, filesystem: Callable[[str], Path]
) -> None:
    monkeypatch.setattr(filesystems, "mount_of", lambda _: None)
    with loopfs.overlay(filesystem("xfs")) as layers:
        assert reason(page(layers.merged)) is FINE
    with loopfs.overlay(filesystem("tmpfs")) as layers:
        assert "(FIEMAP)" in str(reason(page(layers.merged)))


@pytest.mark.parametrize(
    "magic", [0xEF53, 0x58465342, 0x9123683E, sparse.TMPFS_MAGIC, sparse.OVERLAYFS_MAGIC]
)
def test_a_number_that_9p_passes_on_from_its_server_is_not_believed(
    magic: int, filesystem: Callable[[str], Path], as_mount: Callable[..., None]
) -> None:
    as_mount("9p", magic=magic)
    assert "on 9p cannot be trusted" in str(reason(page(filesystem("tmpfs"))))  # without a map


# tmpfs


@pytest.mark.parametrize("huge", ["always", "within_size", "advise"])
def test_a_tmpfs_with_huge_pages_is_refused(huge: str, filesystem: Callable[[str], Path]) -> None:
    kind = "tmpfs_huge" if huge == "always" else f"tmpfs_{huge}"
    assert f"with huge={huge} " in str(reason(page(filesystem(kind))))


def test_a_tmpfs_is_refused_where_the_kernel_forces_huge_pages(
    filesystem: Callable[[str], Path], shmem_enabled: Callable[[str], None]
) -> None:
    path = page(filesystem("tmpfs"))
    for word in ("never", "advise", "always", "deny"):  # of the kernel's own mount, but `deny`
        shmem_enabled(word)
        assert reason(path) is FINE
    shmem_enabled("force")
    assert "'force'" in str(reason(path))


def test_a_tmpfs_whose_options_cannot_be_read_is_refused(public_path: Path) -> None:
    with loopfs.made("tmpfs", public_path) as root:
        fd = os.open(page(root), os.O_RDONLY)
        try:
            assert untrusted_filesystem(fd) is FINE
            subprocess.run(["umount", "--lazy", root], check=True)
            assert "its option huge= is not known" in str(untrusted_filesystem(fd))
        finally:
            os.close(fd)


# Overlays


@contextmanager
def mounted_overlay(merged: Path, options: str) -> Iterator[Path]:
    merged.mkdir()
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True)
    try:
        yield merged
    finally:
        mounttable.unmount(str(merged))


def test_directories_with_colons_blanks_and_commas(filesystem: Callable[[str], Path]) -> None:
    root = filesystem("ext4")
    for name in ("a:b c", "d\\e", "up,per", "work"):
        (root / name).mkdir()
    page(root / "d\\e")
    lower = str(root / "a:b c").replace(":", "\\:") + ":" + str(root / "d\\e").replace("\\", "\\\\")
    options = f"lowerdir={lower},upperdir={root}/up\\,per,workdir={root}/work"
    with mounted_overlay(root / "merged", options) as merged:
        fd = os.open(merged / "file", os.O_RDONLY)
        mount = mount_of(fd)
        os.close(fd)
        assert mount is not None
        names = [os.path.relpath(d, root) for d in overlay_directories(mount.options)]
        # mount(8) of Debian 12 gives the kernel the backslash too, that of Debian 13 does not.
        right = ["up,per", "a:b c", "d\\e"]
        assert names in (right, ["up\\,per", *right])
        assert reason(merged / "file") is FINE


def test_a_part_of_an_overlay_that_is_mounted_elsewhere(
    filesystem: Callable[[str], Path], public_path: Path
) -> None:
    with loopfs.overlay(filesystem("tmpfs")) as layers:
        (layers.merged / "inner").mkdir()
        path = page(layers.merged / "inner")
        part = public_path / "part"
        part.mkdir()
        subprocess.run(["mount", "--bind", path.parent, part], check=True)
        try:
            assert reason(part / "file") is FINE
        finally:
            mounttable.unmount(str(part))


@pytest.mark.parametrize(("kind", "status"), [("ext4", 0), ("tmpfs", 5)])
def test_who_may_not_search_the_directories_goes_by_what_the_overlay_passes_through(
    kind: str, status: int, filesystem: Callable[[str], Path], public_path: Path
) -> None:
    secret, shown = filesystem(kind), public_path / "shown"
    shown.mkdir()
    with loopfs.overlay(secret) as layers:
        write_layer(layers.merged / "base", 4 * PAGE, [])
        page(layers.merged)
        secret.chmod(0o700)
        subprocess.run(["mount", "--bind", layers.merged, shown], check=True)
        try:
            command: list[str | Path] = ["info", "--base", shown / "base", "--diff", shown / "file"]
            assert as_user(os.geteuid(), 0, command).returncode == 0
            assert as_user(NOBODY, NOBODY, command).returncode == status
        finally:
            mounttable.unmount(str(shown))


@pytest.mark.parametrize(("kind", "trusted"), [("tmpfs", True), ("tmpfs_advise", False)])
def test_a_bind_mount_is_what_it_shows(
    kind: str, trusted: bool, filesystem: Callable[[str], Path], public_path: Path
) -> None:
    path, shown = page(filesystem(kind)), public_path / "shown"
    shown.touch()
    subprocess.run(["mount", "--bind", path, shown], check=True)
    try:
        assert (reason(shown) is FINE) == trusted
    finally:
        mounttable.unmount(str(shown))


def test_the_directory_that_stores_the_file_is_named(filesystem: Callable[[str], Path]) -> None:
    lower = filesystem("tmpfs_advise")
    page(lower)
    with loopfs.overlay(filesystem("ext4"), lower) as layers:
        text = str(reason(layers.merged / "file"))
        assert f"{lower} stores the file, and the extents on tmpfs cannot be trusted" in text
        (layers.merged / "file").unlink()
        assert reason(page(layers.merged)) is FINE


def test_a_namesake_in_the_place_of_an_overlays_directory_is_not_taken_for_it(
    filesystem: Callable[[str], Path],
) -> None:
    """As in a container, where the paths that the mount was made with are others."""
    lower, bait = filesystem("tmpfs_advise"), filesystem("ext4")
    page(lower)
    page(bait)
    with loopfs.overlay(filesystem("ext4"), lower) as layers:
        subprocess.run(["mount", "--bind", bait, lower], check=True)
        try:
            text = str(reason(layers.merged / "file"))
        finally:
            mounttable.unmount(str(lower))
        assert "what stores the file is not found in its directories" in text
