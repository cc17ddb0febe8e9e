"""Copies of the files beside a memory image: their bytes, holes, modes and times."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from diffmergefs.core.errors import FileAccessError
from diffmergefs.writing.companions import Excluded, copy_file, copy_folder
from tests.support.images import PAGE, signed, write_layer
from tests.support.stores import OLD_NS, age

NOTHING = Excluded((), ())


def copied(folder: Path, target: Path, excluded: Excluded = NOTHING) -> set[str]:
    """The paths in the copy of the folder."""
    target.mkdir()
    fd = os.open(folder, os.O_PATH)
    try:
        copy_folder(fd, str(folder), str(target), excluded)
    finally:
        os.close(fd)
    return {str(path.relative_to(target)) for path in target.rglob("*")}


def test_a_folder_is_copied_with_its_holes_modes_and_times(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "inner").mkdir(parents=True)
    sparse = write_layer(source / "inner" / "disk", 64 * PAGE, [(PAGE, signed(1, PAGE, PAGE))])
    (source / "empty").touch()
    (source / "link").symlink_to("/nowhere")
    sparse.chmod(0o640)
    age(sparse, source / "empty")
    (source / "inner").chmod(0o500)
    assert copied(source, target) == {"inner", "inner/disk", "empty", "link"}
    copy = target / "inner" / "disk"
    assert copy.read_bytes() == sparse.read_bytes()
    assert copy.stat().st_blocks <= sparse.stat().st_blocks
    assert stat.S_IMODE(copy.stat().st_mode) == 0o640
    assert stat.S_IMODE((target / "inner").stat().st_mode) == 0o500
    assert copy.stat().st_mtime_ns == (target / "empty").stat().st_mtime_ns == OLD_NS
    assert os.readlink(target / "link") == "/nowhere"


def test_what_is_excluded_temporary_or_no_file_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("kept", "by-path", "by-inode", "x.tmp", ".diffmergefs-x"):
        (source / name).write_text(name)
    os.link(source / "by-inode", source / "its-other-name")
    os.mkfifo(source / "fifo")
    monkeypatch.chdir(source)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    status = (source / "by-inode").stat()
    excluded = Excluded({str(source / "by-path")}, {(status.st_dev, status.st_ino)})
    assert copied(source, tmp_path / "target", excluded) == {"kept"}


def test_a_failure_names_the_file_by_its_label(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(FileAccessError, match=r"^the/label: No such file"):
            copy_file(root, "none", str(tmp_path / "target"), "the/label")
    finally:
        os.close(root)
    assert not (tmp_path / "target").exists()
