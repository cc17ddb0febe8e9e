"""Outputs have their name when they are whole, or never; what killed writers left goes."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.core.errors import FileAccessError, NoSpaceError, OutputRefusedError
from diffmergefs.stores.snapshot import is_left_out
from diffmergefs.writing.output import OutputDirectory
from tests.support.calls import first
from tests.support.subjects.output import NAME, directory, names, without_tmpfile, write, writing

__all__ = ["directory"]


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_leftover_is_removed(
    directory: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / NAME).write_bytes(b"half")
    (directory / NAME).chmod(mode)
    write(directory / "image")
    assert names(directory) == ["image"]
    assert f"{directory / NAME}: left by a killed process, removed" in caplog.text


def test_a_leftover_that_is_the_output_too_is_only_a_name(directory: Path) -> None:
    """As a kill between the link and the removal of the temporary name leaves it."""
    write(directory / "image")
    (directory / NAME).hardlink_to(directory / "image")
    write(directory / "other")
    assert names(directory) == ["image", "other"]
    assert (directory / "image").read_bytes() == b"image"


@pytest.mark.parametrize(
    "name",
    [
        ".diffmergefs-0123456789abcdeF.tmp",
        ".diffmergefs-0123456789abcde.tmp",
        ".diffmergefs-0123456789abcdef.tmp2",
        ".diffmergefs-.tmp",
        "diffmergefs-0123456789abcdef.tmp",
        "x.diffmergefs-0123456789abcdef.tmp",
        "image.tmp",
    ],
)
def test_a_file_of_another_name_stays(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"mine")
    write(directory / "image")
    assert (directory / name).read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["directory", "symlink", "fifo"])
def test_what_is_no_regular_file_stays(directory: Path, kind: str) -> None:
    path = directory / NAME
    match kind:
        case "directory":
            path.mkdir()
        case "symlink":
            (directory / "aim").write_bytes(b"mine")
            path.symlink_to("aim")
        case "fifo":
            os.mkfifo(path)
    before = path.lstat()
    write(directory / "image")
    assert path.lstat() == before
    assert kind != "symlink" or (directory / "aim").exists()


def test_an_input_stays(directory: Path) -> None:
    (directory / NAME).write_bytes(b"a layer of that name")
    write(directory / "image", directory / NAME)
    assert names(directory) == [NAME, "image"]


def test_what_somebody_holds_stays(directory: Path) -> None:
    with (directory / NAME).open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write(directory / "image")
        assert names(directory) == [NAME, "image"]
    write(directory / "image", force=True)
    assert names(directory) == ["image"]


def test_a_refused_output_removes_nothing(directory: Path) -> None:
    (directory / NAME).write_bytes(b"half")
    (directory / "image").write_bytes(b"old")
    with pytest.raises(OutputRefusedError):
        write(directory / "image")
    assert names(directory) == [NAME, "image"]


@pytest.mark.parametrize("force", [False, True])
def test_a_writer_leaves_another_ones_file_alone(directory: Path, force: bool) -> None:
    """Each while the other is at work, and under the temporary name of a replacement too."""
    with writing(directory / "first", force=force) as first:
        with writing(directory / "second", force=force) as second:
            write(directory / "third")
            second.finish(0o600)
            second.publish()
        first.finish(0o600)
        first.publish()
    assert names(directory) == ["first", "second", "third"]
    for name in names(directory):
        assert (directory / name).read_bytes() == name.encode()


def test_a_replacement_is_locked_under_its_temporary_name(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def watched(source: str, *rest: Any, **named: Any) -> None:
        write(directory / "other", force=True)
        assert (directory / source).exists()
        replace(source, *rest, **named)

    monkeypatch.setattr(os, "replace", first(lambda *_, **__: monkeypatch.undo(), watched))
    write(directory / "image", force=True)
    assert names(directory) == ["image", "other"]


def test_a_file_taken_for_a_leftover_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process came between the creation of the temporary file and its lock."""
    without_tmpfile(monkeypatch)
    lock = fcntl.flock
    removed: list[Path] = []

    def late(fd: int, how: int) -> None:
        if not removed:
            removed.extend(tmp_path.glob(".diffmergefs-*.tmp"))
            removed[0].unlink()
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write(tmp_path / "image")
    assert len(removed) == 1
    assert (tmp_path / "image").read_bytes() == b"image"
    assert names(tmp_path) == ["image"]


def test_where_there_are_no_locks_nothing_is_removed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refusing)
    (directory / NAME).write_bytes(b"half, or another one's")
    write(directory / "image")
    assert names(directory) == [NAME, "image"]


def test_a_leftover_that_cannot_be_removed_is_no_failure(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / NAME).write_bytes(b"half")
    unlink = os.unlink

    def refusing(path: Any, **named: Any) -> None:
        if path == NAME:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        unlink(path, **named)

    monkeypatch.setattr(os, "unlink", refusing)
    write(directory / "image")
    assert names(directory) == [NAME, "image"]
    assert f"{directory / NAME}: temporary, but cannot be removed" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_a_new_file(
    directory: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def full(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        fd = real(path, flags, *rest, **named)  # refused first where there is no O_TMPFILE
        if flags & (os.O_CREAT | os.O_RDWR):
            os.close(fd)
            raise OSError(number, os.strerror(number))
        return fd

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(
        NoSpaceError, match=f"image: {os.strerror(number)}: cannot create it, [0-9]+"
    ):
        write(directory / "image")
    assert names(directory) == []


# Directories


def test_a_directory_appears_when_it_is_published(tmp_path: Path) -> None:
    with OutputDirectory(f"{tmp_path}/new/") as directory:
        assert directory.final == str(tmp_path / "new")
        (name,) = os.listdir(tmp_path)
        assert directory.target == str(tmp_path / name) and is_left_out(name)
        assert stat.S_IMODE(os.stat(directory.target).st_mode) == 0o700
        Path(directory.target, "file").write_text("whole")
        directory.publish(0o751)
        assert os.listdir(tmp_path) == ["new"]
    assert (tmp_path / "new" / "file").read_text() == "whole"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o751


def test_a_directory_with_a_relative_name_is_in_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with OutputDirectory("new") as directory:
        directory.publish(0o700)
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_a_directory_before_that_leaves_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), OutputDirectory(str(tmp_path / "new")) as directory:
        os.makedirs(f"{directory.target}/a/b")
        Path(directory.target, "a", "file").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_a_directory_is_refused_where_anything_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "new"
    make: dict[str, Callable[[], None]] = {
        "file": path.touch,
        "directory": path.mkdir,
        "symlink": lambda: path.symlink_to("no"),
    }
    with OutputDirectory(str(path)) as directory:
        make[kind]()
        with pytest.raises(OutputRefusedError, match="exists"):
            directory.publish(0o700)
    assert os.listdir(tmp_path) == ["new"]
    with pytest.raises(OutputRefusedError, match="exists"), OutputDirectory(str(path)):
        pass
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("name", ["", "/"])
def test_a_directory_without_a_new_name_is_refused(name: str) -> None:
    with pytest.raises(OutputRefusedError, match="names no new directory"), OutputDirectory(name):
        pass


def test_a_directory_needs_its_parent(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="No such file"), OutputDirectory(f"{tmp_path}/a/b"):
        pass


def test_directories_that_killed_writers_left_are_removed_and_nothing_else(tmp_path: Path) -> None:
    left, held = (tmp_path / f".diffmergefs-{c * 16}.new" for c in "ab")
    for path in (left, held):
        (path / "tag").mkdir(parents=True)
        (path / "tag" / "memory.bin").write_text("half")
    others = [".diffmergefs-0123.new", ".diffmergefs-dddddddddddddddd.new", "tag.new"]
    (tmp_path / others[0]).mkdir()
    (tmp_path / others[1]).write_text("a file")
    (tmp_path / others[2]).mkdir()
    fd = os.open(held, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with OutputDirectory(str(tmp_path / "new")) as directory:
        found = set(os.listdir(tmp_path)) - {os.path.basename(directory.target)}
        # While it is being filled, nobody takes it for a leftover.
        with OutputDirectory(str(tmp_path / "other")):
            assert os.path.isdir(directory.target)
    os.close(fd)
    assert found == {held.name, *others}
