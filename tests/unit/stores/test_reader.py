"""What all readers share: the source that they get, and one directory per snapshot."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from diffmergefs.core import beneath
from diffmergefs.core.beneath import AllowedRoots, Root
from diffmergefs.core.errors import BrokenChainError, FileAccessError, ForeignFormatError
from diffmergefs.core.identity import FileKey, FileVersion
from diffmergefs.stores.reader import (
    FolderReader,
    Source,
    has_file,
    listed_names,
    names_of,
    open_source,
    require_own_path,
)
from diffmergefs.stores.snapshot import Snapshot


class NotesReader(FolderReader):
    """A tag is a directory with a file `note`, and what is in that file is its vmstate."""

    name = "notes"
    documents = ("note", "more")
    device_state = ("state",)

    def is_tag(self, root: Root, name: str) -> bool:
        return has_file(root, f"{name}/note")

    def describe(self, source: Source, tag: str, seen: Snapshot) -> Snapshot:
        text = (Path(source.path) / tag / "note").read_text()
        if text == "broken":
            raise BrokenChainError("as it was raised")
        if text == "unreadable":
            raise OSError(errno.EIO, "Input/output error")
        return replace(seen, vmstate=text)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    """Two tags, a plain directory, a file, and an entry whose lstat fails."""
    for name in ("a", "b", "plain"):
        (tmp_path / name).mkdir()
    for tag in ("a", "b"):
        (tmp_path / tag / "note").write_text(f"state of {tag}")
    (tmp_path / "file").touch()
    fd = open_source(str(tmp_path))
    statuses = {name: (tmp_path / name).lstat() for name in os.listdir(tmp_path)}
    refused = {"hidden": (0, "Permission denied"), "link": (stat.S_IFLNK, "Stale file handle")}
    yield Source(str(tmp_path), AllowedRoots(fd), statuses, refused=refused)
    os.close(fd)


def test_a_source_has_the_kind_of_each_name_and_both_of_its_paths(
    source: Source, tmp_path: Path
) -> None:
    folders = dict.fromkeys(("a", "b", "plain"), stat.S_IFDIR)
    others = {"file": stat.S_IFREG, "hidden": 0, "link": stat.S_IFLNK}
    assert source.kinds == folders | others
    # What refuses to tell may be a directory.
    assert sorted(source.folders) == ["a", "b", "hidden", "plain"]
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a")
    assert replace(source, path=str(link)).paths == {str(link), str(tmp_path / "a")}


def test_each_tag_is_a_snapshot_with_its_documents_and_device_state(
    source: Source, tmp_path: Path
) -> None:
    (tmp_path / "a" / "state").write_text("x")
    found = NotesReader().read(source)
    assert {tag: each.vmstate for tag, each in found.items()} == {
        "a": "state of a",
        "b": "state of b",
    }
    assert found["a"].folder == "a" and found["a"].problem is None
    note = FileKey.of((tmp_path / "a" / "note").stat())
    assert found["a"].documents == {"a/note": note}  # there is no `more`
    version = FileVersion.of((tmp_path / "a" / "state").stat())
    assert (found["a"].device_state, found["b"].device_state) == (
        {"a/state": version},
        {"b/state": None},
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [("broken", "as it was raised"), ("unreadable", "b: Input/output error")],
)
def test_what_is_raised_for_one_tag_is_the_problem_of_that_tag(
    text: str, problem: str, source: Source, tmp_path: Path
) -> None:
    (tmp_path / "b" / "note").write_text(text)
    found = NotesReader().read(source)
    assert (found["b"].problem, found["b"].folder) == (problem, "b")
    assert found["a"].problem is None


def test_a_directory_in_a_declined_format_is_broken_also_if_it_is_no_tag(
    source: Source, tmp_path: Path
) -> None:
    for folder in ("b", "plain"):
        (tmp_path / folder / "memfile.header").touch()
    found = NotesReader().read(source)
    for folder in ("b", "plain"):
        assert str(found[folder].problem).startswith(f"{folder}: is an e2b build: ")
        assert found[folder].folder is None


def test_names_of_unfinished_writers_are_no_tags(source: Source, tmp_path: Path) -> None:
    (tmp_path / "a").rename(tmp_path / ".diffmergefs-a.new")
    (tmp_path / "b").rename(tmp_path / "b.tmp")
    names = {name: (tmp_path / name).lstat() for name in os.listdir(tmp_path)}
    now = replace(source, statuses=names)
    assert NotesReader().read(now) == {}
    assert not NotesReader().finds(now)


def test_a_directory_that_cannot_be_read_is_broken_and_says_nothing_about_the_layout(
    source: Source,
) -> None:
    class Refused(NotesReader):
        def is_tag(self, root: Root, name: str) -> bool:
            raise PermissionError(errno.EACCES, "Permission denied")

    assert NotesReader().finds(source)
    assert not Refused().finds(source)
    assert {tag: each.problem for tag, each in Refused().read(source).items()} == {
        name: f"{name}: Permission denied" for name in source.folders
    }


# The functions


def test_a_source_is_opened_by_its_path_or_anew_by_a_descriptor(tmp_path: Path) -> None:
    first = open_source(str(tmp_path))
    (tmp_path / "file").touch()
    again = open_source("any name", first)
    assert os.listdir(again) == ["file"]
    assert os.path.samestat(os.fstat(first), os.fstat(again)) and first != again
    os.close(first)
    os.close(again)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda path: None, FileAccessError, "No such file or directory"),
        (lambda path: path.touch(), FileAccessError, "a file, not a directory of snapshots"),
        (lambda path: path.write_bytes(b"QFI\xfb"), ForeignFormatError, "is a qcow2 image"),
    ],
)
def test_what_is_no_directory_is_refused_by_what_it_is(
    make: Callable[[Path], object],
    error: type[Exception],
    text: str,
    tmp_path: Path,
) -> None:
    make(tmp_path / "source")
    with pytest.raises(error, match=f"source: {text}"):
        open_source(str(tmp_path / "source"))


def test_only_a_file_of_a_declined_format_is_refused_by_its_path(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "memory").write_bytes(b"guest memory")
    for name in ("fifo", "memory", "missing", "."):
        require_own_path(str(tmp_path / name))
    (tmp_path / "memfile").touch()
    (tmp_path / "memfile.header").touch()
    with pytest.raises(ForeignFormatError, match="memfile: is an e2b build"):
        require_own_path(str(tmp_path / "memfile"))


def test_names_are_listed_or_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "link").symlink_to("folder")
    root = os.open(tmp_path, os.O_PATH)
    assert listed_names(root, "folder") == names_of(root, "folder") == {"file"}
    for name in ("missing", "link", "folder/file"):
        assert names_of(root, name) == frozenset()
        with pytest.raises(OSError):
            listed_names(root, name)
    os.close(root)


def test_a_file_that_may_exist_does_not_count_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    root = os.open(tmp_path, os.O_PATH)
    assert has_file(root, "file")
    assert not has_file(root, "missing") and not has_file(root, "file/inside")

    def refuse(*_: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(beneath, "stat_beneath", refuse)
    with pytest.raises(PermissionError):
        has_file(root, "missing")
    os.close(root)
