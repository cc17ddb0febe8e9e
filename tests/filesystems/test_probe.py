"""What filesystems do with a sparse file, tried out on real ones."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.checks import probe
from diffmergefs.checks.diagnosis import Finding
from diffmergefs.core import sparse
from diffmergefs.core.extents import Extent, ExtentList
from tests.filesystems.wrong_bytes import places
from tests.support import loopfs
from tests.support.commands import as_user, diffmergefs
from tests.support.users import NOBODY

CHECKS = ["filesystem", "grain", "zeros", "mappings", "reflink", "lease"]


def examined(folder: Path, page: int = 4096) -> dict[str, Finding]:
    findings = list(probe.examine_filesystem(str(folder), page))
    assert {finding.subject for finding in findings} == {str(folder)}
    for finding in findings:
        assert bool(finding.why) == bool(finding.remedy) == (finding.severity != "fine")
    return {finding.check: finding for finding in findings}


def test_filesystems_for_snapshots_are_fine(real_fs: Path) -> None:
    found = examined(real_fs)
    kind = real_fs.parent.name
    if kind == "tmpfs":
        assert found.pop("readers").severity == "warning"
    assert list(found) == CHECKS
    assert {f.severity for f in found.values()} == {"fine"}
    assert found["filesystem"].finding == f"a filesystem of type {kind}"
    assert ("shares blocks" in found["reflink"].finding) == (kind in ("xfs", "btrfs"))
    assert list(real_fs.iterdir()) == []


def test_an_overlay_is_fine_too(overlay_fs: loopfs.Overlay) -> None:
    found = examined(overlay_fs.merged)
    assert list(found) == CHECKS and found["grain"].severity == found["zeros"].severity == "fine"
    # What the kernel answers of a writer there depends on its version.
    assert found["lease"].severity in ("fine", "warning")


@pytest.mark.parametrize(("kind", "grain"), [("xfs16k", 16384), ("tmpfs_huge", 2 << 20)])
def test_a_grain_coarser_than_the_page_is_wrong(
    kind: str, grain: int, filesystem: Callable[[str], Path]
) -> None:
    folder = filesystem(kind)
    coarse = examined(folder)["grain"]
    assert coarse.severity == "wrong"
    assert (
        coarse.finding == f"one written page of 4096 bytes, but {grain} bytes of data are reported"
    )
    assert examined(folder, grain)["grain"].severity == "fine"


def test_a_filesystem_that_reports_all_as_data_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "data_extents", lambda _, size: iter([Extent(0, size)]))
    found = examined(tmp_path)
    assert f"but {16 << 20} bytes of data" in found["grain"].finding
    assert [found[check].severity for check in ("grain", "zeros")] == ["wrong", "fine"]


def test_a_filesystem_that_makes_holes_of_zeros_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = sparse.data_extents

    def without_zeros(fd: int, size: int) -> Iterator[tuple[int, int]]:
        return (
            (start, stop)
            for start, stop in walk(fd, size)
            if any(os.pread(fd, stop - start, start))
        )

    monkeypatch.setattr(sparse, "data_extents", without_zeros)
    found = examined(tmp_path)
    assert [found[check].severity for check in ("grain", "zeros")] == ["fine", "wrong"]


@pytest.mark.parametrize("kind", ["tmpfs_advise", "tmpfs_huge"])
def test_a_filesystem_that_is_not_on_the_list_is_wrong(
    kind: str, filesystem: Callable[[str], Path]
) -> None:
    found = examined(filesystem(kind))["filesystem"]
    assert found.severity == "wrong" and "on tmpfs cannot be trusted: with huge=" in found.finding


@pytest.mark.parametrize(("upper", "severity"), [("tmpfs", "fine"), ("tmpfs_advise", "wrong")])
def test_of_an_overlay_the_directory_counts_in_which_new_files_lie(
    upper: str, severity: str, filesystem: Callable[[str], Path]
) -> None:
    lower = filesystem("ext4")
    (lower / "folder").mkdir()
    with loopfs.overlay(filesystem(upper), lower) as layers:
        assert examined(layers.merged)["filesystem"].severity == severity
        assert examined(layers.merged / "folder")["filesystem"].severity == severity


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
    found = examined(real_fs)["mappings"]
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
        found = examined(folder)["readers"]
    else:
        with loopfs.overlay(folder) as layers:
            found = examined(layers.merged)["readers"]
    assert found.severity == "warning" and "diffmergefs seal" in found.remedy


def test_a_filesystem_without_mappings_is_tried_out_but_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert list(examined(tmp_path)) == [check for check in CHECKS if check != "mappings"]


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
            assert examined(folder)["filesystem"].severity == severity


def test_no_leases_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control = fcntl.fcntl

    def without(fd: int, command: int, *rest: Any) -> Any:
        if command == fcntl.F_SETLEASE:
            raise OSError(22, "Invalid argument")
        return control(fd, command, *rest)

    monkeypatch.setattr(fcntl, "fcntl", without)
    assert examined(tmp_path)["lease"].severity == "warning"


def test_a_directory_that_cannot_be_written_is_told_of_by_metadata(public_path: Path) -> None:
    done = as_user(NOBODY, NOBODY, ["doctor", public_path])
    assert done.stderr == ""  # whether that user can mount is another matter
    assert "warning  holes could not be tested: Permission denied" in done.stdout
    assert "only its block size of 4096 bytes" in done.stdout


def test_a_filesystem_without_unnamed_files_is_tried_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False)
    monkeypatch.delattr(os, "O_TMPFILE")
    assert list(examined(tmp_path)) == CHECKS
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(probe.examine_filesystem(str(tmp_path / "gone")))
