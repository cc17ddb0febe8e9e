"""How a filesystem treats a sparse file, on one whose answers are replaced."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.checks import probe
from diffmergefs.core import sparse
from diffmergefs.core.extents import Extent
from tests.support.subjects.probe import CHECKS, examined


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


def test_a_filesystem_without_mappings_is_tried_out_but_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert list(examined(tmp_path)) == [check for check in CHECKS if check != "mappings"]


def test_no_leases_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control = fcntl.fcntl

    def without(fd: int, command: int, *rest: Any) -> Any:
        if command == fcntl.F_SETLEASE:
            raise OSError(22, "Invalid argument")
        return control(fd, command, *rest)

    monkeypatch.setattr(fcntl, "fcntl", without)
    assert examined(tmp_path)["lease"].severity == "warning"


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
