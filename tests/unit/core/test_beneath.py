"""Opening beneath a directory: nothing leads out of it, and nothing but regular files is opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core import beneath
from diffmergefs.core.errors import FileAccessError
from diffmergefs.core.layer import Layer
from tests.support.subjects.beneath import root, tree

__all__ = ["root", "tree"]

Opener = Callable[[int, str], object]
OPENERS: list[Opener] = [
    beneath.open_regular,
    beneath.open_handle,
    beneath.open_directory,
    beneath.stat_beneath,
]


def content(root: int | None, path: str) -> bytes:
    with open(beneath.open_regular(root, path), "rb") as file:
        return file.read()


@pytest.mark.parametrize("path", ["file", "./file", "folder/../file"])
def test_a_file_is_opened_by_its_path_unless_it_goes_up(path: str, root: int) -> None:
    if ".." in path:
        with pytest.raises(FileAccessError, match="not a path beneath"):
            content(root, path)
    else:
        assert content(root, path) == b"in the root"


def test_a_deep_file_and_its_status(root: int, tree: Path) -> None:
    assert content(root, "folder/inner/deep") == b"deep"
    expected = (tree / "folder/inner/deep").stat().st_ino
    assert beneath.stat_beneath(root, "folder/inner/deep").st_ino == expected


def test_descriptors_are_read_only_and_not_inherited(root: int) -> None:
    fd = beneath.open_regular(root, "file")
    try:
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
    finally:
        os.close(fd)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("path", ["..", "../outside", "folder/../../outside", "/etc/passwd", "a\0"])
def test_a_path_that_could_leave_is_refused(opener: Opener, path: str, root: int) -> None:
    with pytest.raises(FileAccessError, match="not a path beneath its directory"):
        opener(root, path)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("path", ["folder_link/inner", "out/outside", "out/root/file"])
def test_no_symlink_on_the_way_is_followed(opener: Opener, path: str, root: int) -> None:
    with pytest.raises(NotADirectoryError):
        opener(root, path)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("link", "a symlink"),
        ("dangling", "a symlink"),
        ("folder", "a directory"),
        ("folder/inner", "a directory"),
        ("fifo", "a FIFO"),
        ("", "a directory"),
        (".", "a directory"),
    ],
)
def test_what_is_no_regular_file_is_refused_by_its_kind(path: str, kind: str, root: int) -> None:
    # An open of the FIFO would wait for a writer for ever.
    with pytest.raises(FileAccessError) as caught:
        beneath.open_regular(root, path)
    assert str(caught.value) == f"{path}: {kind}, not a regular file"


def test_a_fifo_is_never_opened_as_an_explicit_layer_either(tree: Path) -> None:
    with pytest.raises(FileAccessError, match=f"{tree}/fifo: a FIFO, not a regular file"):
        Layer.open(str(tree / "fifo"))


def test_an_explicit_path_follows_symlinks(tree: Path) -> None:
    assert content(None, str(tree / "link")) == b"in the root"
    assert content(None, str(tree / "out" / "outside")) == b"secret"


def test_the_file_that_was_judged_is_the_file_that_is_opened(
    root: int, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat = os.fstat

    def exchange(fd: int) -> os.stat_result:
        status = fstat(fd)
        (tree / "file").unlink(missing_ok=True)
        os.mkfifo(tree / "file")
        monkeypatch.undo()
        return status

    monkeypatch.setattr(os, "fstat", exchange)
    assert content(root, "file") == b"in the root"


def test_directories_are_opened_but_not_through_a_link(root: int, tree: Path) -> None:
    for path in ("", ".", "folder", "folder/inner"):
        fd = beneath.open_directory(root, path)
        assert os.fstat(fd).st_ino == (tree / path).stat().st_ino
        assert os.listdir(fd) == os.listdir(tree / path)
        os.close(fd)
    for path in ("folder_link", "out", "file", "fifo", "link"):
        with pytest.raises(NotADirectoryError):
            beneath.open_directory(root, path)


def test_the_status_of_a_link_is_its_own(root: int) -> None:
    assert stat.S_ISLNK(beneath.stat_beneath(root, "link").st_mode)
    assert stat.S_ISDIR(beneath.stat_beneath(root, "").st_mode)
    assert stat.S_ISFIFO(beneath.stat_beneath(root, "fifo").st_mode)


def test_a_handle_of_a_link_or_a_fifo_opens_nothing(root: int) -> None:
    for path, is_kind in (("link", stat.S_ISLNK), ("fifo", stat.S_ISFIFO)):
        fd = beneath.open_handle(root, path)
        assert is_kind(os.fstat(fd).st_mode)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.read(fd, 1)
        os.close(fd)


@pytest.mark.parametrize("opener", OPENERS)
def test_what_does_not_exist_is_an_oserror(opener: Opener, root: int) -> None:
    for path in ("nothing", "folder/nothing", "nothing/file"):
        with pytest.raises(FileNotFoundError):
            opener(root, path)
