"""What filesystems do with a sparse file, tried out on real ones."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.extents import ExtentList
from tests.filesystems.wrong_bytes import places
from tests.support import loopfs
from tests.support.commands import as_user, diffmergefs
from tests.support.subjects.doctor import CHECKS, probed
from tests.support.users import NOBODY


def test_filesystems_for_snapshots_are_fine(real_fs: Path) -> None:
    found = probed(real_fs)
    kind = real_fs.parent.name
    if kind == "tmpfs":
        assert found.pop("readers").severity == "warning"
    assert list(found) == CHECKS
    assert {f.severity for f in found.values()} == {"fine"}
    assert found["filesystem"].finding == f"a filesystem of type {kind}"
    assert ("shares blocks" in found["reflink"].finding) == (kind in ("xfs", "btrfs"))
    assert list(real_fs.iterdir()) == []


def test_an_overlay_is_fine_too(overlay_fs: loopfs.Overlay) -> None:
    found = probed(overlay_fs.merged)
    assert list(found) == CHECKS and found["grain"].severity == found["zeros"].severity == "fine"
    # What the kernel answers of a writer there depends on its version.
    assert found["lease"].severity in ("fine", "warning")


@pytest.mark.parametrize(("kind", "grain"), [("xfs16k", 16384), ("tmpfs_huge", 2 << 20)])
def test_a_grain_coarser_than_the_page_is_wrong(
    kind: str, grain: int, filesystem: Callable[[str], Path]
) -> None:
    folder = filesystem(kind)
    coarse = probed(folder)["grain"]
    assert coarse.severity == "wrong"
    assert (
        coarse.finding == f"one written page of 4096 bytes, but {grain} bytes of data are reported"
    )
    assert probed(folder, grain)["grain"].severity == "fine"


@pytest.mark.parametrize("kind", ["tmpfs_advise", "tmpfs_huge"])
def test_a_filesystem_that_is_not_on_the_list_is_wrong(
    kind: str, filesystem: Callable[[str], Path]
) -> None:
    found = probed(filesystem(kind))["filesystem"]
    assert found.severity == "wrong" and "on tmpfs cannot be trusted: with huge=" in found.finding


@pytest.mark.parametrize(("upper", "severity"), [("tmpfs", "fine"), ("tmpfs_advise", "wrong")])
def test_of_an_overlay_the_directory_counts_in_which_new_files_lie(
    upper: str, severity: str, filesystem: Callable[[str], Path]
) -> None:
    lower = filesystem("ext4")
    (lower / "folder").mkdir()
    with loopfs.overlay(filesystem(upper), lower) as layers:
        assert probed(layers.merged)["filesystem"].severity == severity
        assert probed(layers.merged / "folder")["filesystem"].severity == severity


def store_through_a_mapping(folder: Path) -> int:
    """How many bytes become data by a store of a page into a file that was read before."""
    with tempfile.TemporaryFile(dir=folder) as file:
        fd = file.fileno()
        os.ftruncate(fd, 16 << 20)
        for offset in range(0, 16 << 20, 1 << 20):
            os.pread(fd, 1 << 20, offset)
        with mmap.mmap(fd, 16 << 20) as memory:
            memory[12 << 20] = 1
        os.fsync(fd)
        return ExtentList(sparse.data_extents(fd, 16 << 20)).data_bytes


def test_what_stores_through_mappings_make_data_is_said_and_is_no_failure(real_fs: Path) -> None:
    found = probed(real_fs)["mappings"]
    stored = store_through_a_mapping(real_fs)
    if real_fs.parent.name == "xfs":
        assert stored > 4096
    assert found.severity == "fine"
    if stored == 4096:
        assert found.finding == "exact with write(2), and through mappings"
    else:
        assert found.finding.startswith("exact with write(2), not through mappings: ")


@pytest.mark.parametrize("kind", ["tmpfs", "overlay on tmpfs"])
def test_readers_that_make_data_of_holes_are_a_warning(
    kind: str, filesystem: Callable[[str], Path]
) -> None:
    folder = filesystem("tmpfs")
    if kind == "tmpfs":
        found = probed(folder)["readers"]
    else:
        with loopfs.overlay(folder) as layers:
            found = probed(layers.merged)["readers"]
    assert found.severity == "warning" and "diffmergefs seal" in found.remedy


def test_a_full_filesystem_ends_nothing(tmp_path: Path) -> None:
    """A store through a mapping that finds no room is SIGBUS, but not here."""
    with loopfs.made("xfs", tmp_path) as folder:
        with (folder / "all").open("wb") as file:
            left = os.fstatvfs(file.fileno())
            os.posix_fallocate(file.fileno(), 0, (left.f_bavail - 40) * left.f_bsize)
        done = diffmergefs("doctor", folder)
    assert done.returncode in (0, 1) and str(folder) in done.stdout


def test_an_overlay_whose_directories_are_out_of_reach_is_judged_by_a_new_file(
    filesystem: Callable[[str], Path],
) -> None:
    for kind, severity in (("ext4", "fine"), ("tmpfs", "wrong")):
        place = places.in_a_container(places.upper(kind))
        with place.filled(filesystem, lambda _: None) as folder:
            assert probed(folder)["filesystem"].severity == severity


def test_a_directory_that_cannot_be_written_is_told_of_by_metadata(public_path: Path) -> None:
    done = as_user(NOBODY, NOBODY, ["doctor", public_path])
    assert done.stderr == ""  # whether that user can mount is another matter
    assert "warning  holes could not be tested: Permission denied" in done.stdout
    assert "only its block size of 4096 bytes" in done.stdout
