"""Which filesystems are trusted, by the type that the kernel reports."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core import sparse
from diffmergefs.opening import filesystems
from diffmergefs.opening.filesystems import overlay_directories, untrusted_filesystem
from tests.support.subjects.filesystems import FINE, as_mount, page, reason, shmem_enabled

__all__ = ["as_mount", "shmem_enabled"]


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
    monkeypatch.setattr(filesystems, "SHMEM_ENABLED", place)
    fd = os.memfd_create("diff")
    try:
        assert (untrusted_filesystem(fd) is FINE) == sysfs
    finally:
        os.close(fd)


def test_the_directories_that_newer_mounts_name_one_by_one() -> None:
    options = ("rw", "lowerdir+=/a:b", "lowerdir+=relative", "datadir+=/c", "upperdir=/u,p")
    assert overlay_directories(options) == ["/u,p", "/a:b", "/c"]
    assert overlay_directories(("lowerdir=/a:/b::/data",)) == ["/a", "/b", "/data"]
