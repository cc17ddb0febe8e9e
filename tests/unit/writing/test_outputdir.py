"""A new directory has its name when it is whole, or never."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from diffmergefs.core.errors import FileAccessError, OutputRefusedError
from diffmergefs.stores.snapshot import is_left_out
from diffmergefs.writing.outputdir import OutputDirectory
from tests.support.users import NOBODY


def test_it_appears_when_it_is_published(tmp_path: Path) -> None:
    with OutputDirectory(f"{tmp_path}/new/") as directory:
        assert directory.final == str(tmp_path / "new")
        (name,) = os.listdir(tmp_path)
        assert directory.path == str(tmp_path / name) and is_left_out(name)
        assert stat.S_IMODE(os.stat(directory.path).st_mode) == 0o700
        Path(directory.path, "file").write_text("whole")
        directory.publish(0o751)
        assert os.listdir(tmp_path) == ["new"]
    assert (tmp_path / "new" / "file").read_text() == "whole"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o751


def test_a_relative_name_is_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with OutputDirectory("new") as directory:
        directory.publish(0o700)
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_it_before_that_leaves_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), OutputDirectory(str(tmp_path / "new")) as directory:
        os.makedirs(f"{directory.path}/a/b")
        Path(directory.path, "a", "file").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_what_is_there_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "new"
    make = {"file": path.touch, "directory": path.mkdir, "symlink": lambda: path.symlink_to("no")}
    with OutputDirectory(str(path)) as directory:
        make[kind]()
        with pytest.raises(OutputRefusedError, match="exists"):
            directory.publish(0o700)
    assert os.listdir(tmp_path) == ["new"]
    with pytest.raises(OutputRefusedError, match="exists"), OutputDirectory(str(path)):
        pass
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("name", ["", "/"])
def test_what_names_nothing_new_is_refused(name: str) -> None:
    with pytest.raises(OutputRefusedError, match="names no new directory"), OutputDirectory(name):
        pass


def test_a_parent_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="No such file"), OutputDirectory(f"{tmp_path}/a/b"):
        pass


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left, held, foreign = (tmp_path / f".diffmergefs-{c * 16}.new" for c in "abc")
    for path in (left, held, foreign):
        (path / "tag").mkdir(parents=True)
        (path / "tag" / "memory.bin").write_text("half")
    os.chown(foreign, NOBODY, NOBODY)
    others = [".diffmergefs-0123.new", ".diffmergefs-dddddddddddddddd.new", "tag.new"]
    (tmp_path / others[0]).mkdir()
    (tmp_path / others[1]).write_text("a file")
    (tmp_path / others[2]).mkdir()
    fd = os.open(held, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with OutputDirectory(str(tmp_path / "new")) as directory:
        found = set(os.listdir(tmp_path)) - {os.path.basename(directory.path)}
        # While it is being filled, nobody takes it for a leftover.
        with OutputDirectory(str(tmp_path / "other")):
            assert os.path.isdir(directory.path)
    os.close(fd)
    assert found == {held.name, foreign.name, *others}
