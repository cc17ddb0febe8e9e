"""Outputs beside files that belong to other users."""

from __future__ import annotations

import os
from pathlib import Path

from diffmergefs.writing.output import OutputDirectory
from tests.support import skips
from tests.support.subjects.output import NAME, directory, names, write
from tests.support.users import NOBODY

__all__ = ["directory"]


def test_another_users_file_stays(directory: Path) -> None:
    skips.require_root()
    (directory / NAME).write_bytes(b"theirs")
    os.chown(directory / NAME, NOBODY, NOBODY)
    write(directory / "image")
    assert names(directory) == [NAME, "image"]


def test_a_directory_that_another_users_writer_left_stays(tmp_path: Path) -> None:
    foreign = tmp_path / f".diffmergefs-{'c' * 16}.new"
    foreign.mkdir()
    os.chown(foreign, NOBODY, NOBODY)
    with OutputDirectory(str(tmp_path / "new")):
        assert foreign.is_dir()
