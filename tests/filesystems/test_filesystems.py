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
from diffmergefs.system.mounttable import Mount, mount_of
from tests.support import loopfs, mounttable
from tests.support.commands import as_user
from tests.support.images import PAGE, write_layer
from tests.support.users import NOBODY

FINE = None


def reason(path: Path) -> str | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        return untrusted_filesystem(fd)
    finally:
        os.close(fd)


def page(directory: Path) -> Path:
    return write_layer(directory / "file", 4 * PAGE, [(PAGE, b"x" * PAGE)])


@pytest.fixture
def as_mount(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``as_mount(kind, *options, magic=...)``: what the kernel says of every file from now on."""

    def pretend(kind: str, *options: str, magic: int = 0x1234) -> None:
        mount = Mount("/", "0:0", kind, "none", 1, 0, "/", options)
        monkeypatch.setattr(filesystems, "mount_of", lambda _: mount)
        monkeypatch.setattr(sparse, "filesystem_magic", lambda _: magic)

    return pretend


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay"])
def test_those_on_the_list_are_trusted(kind: str, filesystem: Callable[[str], Path]) -> None:
    directory = filesystem(kind)
    assert reason(page(directory)) is FINE and reason(directory) is FINE


@pytest.mark.parametrize("kind", ["nfs", "nfs4"])
def test_nfs_4_2_is_trusted(kind: str, tmp_path: Path, as_mount: Callable[..., None]) -> None:
    as_mount(kind, "rw", "vers=4.2", magic=sparse.NFS_MAGIC)
    assert reason(page(tmp_path)) is FINE


@pytest.mark.parametrize("version", ["vers=3", "vers=4.0", "vers=4.1", None])
def test_nfs_before_4_2_is_not(
    version: str | None, tmp_path: Path, as_mount: Callable[..., None]
) -> None:
    as_mount("nfs4", "rw", version or "hard", magic=sparse.NFS_MAGIC)
    assert f"({version or 'vers unknown'})" in str(reason(page(tmp_path)))


@pytest.mark.parametrize(
    "kind", ["f2fs", "bcachefs", "ocfs2", "gfs2", "virtiofs", "fuse.fuse-overlayfs", "fuseblk"]
)
def test_what_only_a_person_can_judge_is_refused_by_its_name(
    kind: str, tmp_path: Path, as_mount: Callable[..., None]
) -> None:
    as_mount(kind)
    for path in (tmp_path, page(tmp_path)):
        text = reason(path)
        assert text is not None and f"on {kind} cannot be trusted" in text
        assert text.endswith("which only you can judge")


OTHERS = ("zfs", "ceph", "cifs", "9p", "vfat", "exfat", "squashfs", "erofs", "newfs", "ecryptfs")


@pytest.mark.parametrize("kind", OTHERS)
def test_all_others_are_refused(kind: str, tmp_path: Path, as_mount: Callable[..., None]) -> None:
    as_mount(kind)
    for path in (tmp_path, page(tmp_path)):
        assert f"on {kind} cannot be trusted: " in str(reason(path))


def test_one_whose_mount_is_not_listed_is_named_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystems, "mount_of", lambda _: None)
    assert reason(page(tmp_path)) is FINE  # ext4: its number, and its map
    monkeypatch.setattr(sparse, "filesystem_magic", lambda _: 0x2FC12FC1)
    assert "on type 0x2fc12fc1 cannot be trusted" in str(reason(page(tmp_path)))
    for magic in (sparse.NFS_MAGIC, sparse.TMPFS_MAGIC):
        monkeypatch.setattr(sparse, "filesystem_magic", lambda _, magic=magic: magic)
        assert reason(page(tmp_path)) is not FINE
    monkeypatch.setattr(sparse, "filesystem_magic", lambda _: sparse.OVERLAYFS_MAGIC)
    assert reason(page(tmp_path)) is FINE  # what it passes through tells


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


@pytest.fixture
def shmem_enabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``shmem_enabled("never")``: what the kernel says of that setting from now on."""
    file = tmp_path / "gone" / "shmem_enabled"
    monkeypatch.setattr(filesystems, "_SHMEM_ENABLED", file)

    def say(word: str) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"always within_size advise never [{word}] deny force\n")

    return say


def test_a_tmpfs_is_refused_where_the_kernel_forces_huge_pages(
    filesystem: Callable[[str], Path], shmem_enabled: Callable[[str], None]
) -> None:
    path = page(filesystem("tmpfs"))
    for word in ("never", "advise", "always", "deny"):  # of the kernel's own mount, but `deny`
        shmem_enabled(word)
        assert reason(path) is FINE
    shmem_enabled("force")
    assert "'force'" in str(reason(path))


@pytest.mark.parametrize(
    ("word", "trusted"),
    [("never", True), ("deny", True)]
    + [(word, False) for word in ("always", "within_size", "advise", "force")],
)
def test_a_memfd_goes_by_the_setting_of_the_kernels_own_mount(
    word: str, trusted: bool, shmem_enabled: Callable[[str], None]
) -> None:
    shmem_enabled(word)
    fd = os.memfd_create("diff")
    try:
        assert (untrusted_filesystem(fd) is FINE) == trusted
    finally:
        os.close(fd)


@pytest.mark.parametrize("sysfs", [True, False])
def test_a_kernel_without_huge_pages_has_no_such_setting(
    sysfs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / ("" if sysfs else "gone") / "transparent_hugepage" / "shmem_enabled"
    monkeypatch.setattr(filesystems, "_SHMEM_ENABLED", place)
    fd = os.memfd_create("diff")
    try:
        assert (untrusted_filesystem(fd) is FINE) == sysfs
    finally:
        os.close(fd)


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
        assert names == ["up\\,per", "up,per", "a:b c", "d\\e"]
        assert reason(merged / "file") is FINE


def test_the_directories_that_newer_mounts_name_one_by_one() -> None:
    options = ("rw", "lowerdir+=/a:b", "lowerdir+=relative", "datadir+=/c", "upperdir=/u,p")
    assert overlay_directories(options) == ["/u,p", "/a:b", "/c"]
    assert overlay_directories(("lowerdir=/a:/b::/data",)) == ["/a", "/b", "/data"]


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
