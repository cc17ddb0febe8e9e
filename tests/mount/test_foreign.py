"""Files in other programs' formats, given to each verb and in a mounted store."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from diffmergefs.checks.doctor import examine_path
from tests.support.commands import diffmergefs, mistake
from tests.support.mounts import mounted
from tests.support.stores import SIZE, write_tag
from tests.support.subjects.foreign import QCOW2, foreign_file

__all__ = ["foreign_file"]


def test_the_command_line_declines_a_file_in_one_line(
    foreign_file: tuple[Path, str, str], tmp_path: Path, mountpoint: Path
) -> None:
    path, name, _ = foreign_file
    for arguments in (
        ("info", path),
        ("info", "--base", path),
        ("list", path),
        ("flatten", path, "-o", tmp_path / "out"),
        ("mount", "-f", path, mountpoint),
        ("mount", "-f", "--base", path, mountpoint),
        ("apply", path, path),
    ):
        assert name in mistake(22, *arguments), arguments
    verified = diffmergefs("verify", "--base", path)
    assert verified.returncode == 1 and name in verified.stdout
    found = [finding.finding for finding in examine_path(str(path)) if finding.severity == "wrong"]
    assert any(name in text for text in found)


def test_a_mount_shows_the_others(tmp_path: Path, mountpoint: Path) -> None:
    store = tmp_path / "store"
    write_tag(store, "good")
    write_tag(store, "qcow2")
    with (store / "qcow2" / "memory.bin").open("r+b") as file:
        file.write(QCOW2)
    os.utime(store / "qcow2" / "memory.bin", ns=(1, 1))
    (store / "build").mkdir()
    (store / "build" / "memfile.header").touch()
    log = ("build: not shown: build: is an e2b build", "memory.bin: is a qcow2 image")
    with mounted(store, mountpoint, expect_log=log):
        assert sorted(os.listdir(mountpoint)) == ["good", "qcow2"]
        assert (mountpoint / "good" / "memory.bin").stat().st_size == SIZE
        with pytest.raises(OSError) as caught:
            (mountpoint / "qcow2" / "memory.bin").read_bytes()
        assert caught.value.errno == errno.EIO
