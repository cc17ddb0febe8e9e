"""Which image, and of which layout, a path that a user gives means."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffmergefs.core.errors import FileAccessError, ForeignFormatError
from diffmergefs.stores.lookup import find_image, is_image, layout_of
from tests.support.stores import write_chain, write_numbered


def test_a_snapshot_directory_is_its_tag_also_through_a_symlink(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "leaf"])
    (tmp_path / "link").symlink_to(store / "leaf")
    for path in (store / "leaf", f"{store}/leaf/", tmp_path / "link"):
        catalog, tag = find_image(path)
        assert (catalog.layout, tag) == ("forkd", "leaf")
        assert [link.tag for link in catalog.chain(tag)] == ["base", "leaf"]
    assert layout_of(str(store / "leaf")) == "forkd"
    assert layout_of(str(store)) is None


def test_a_numbered_file_is_the_tag_of_its_name(tmp_path: Path) -> None:
    names = ["000-base.mem", "001-a.mem", "002-b.mem"]
    folder = write_numbered(tmp_path / "layers", names, companions=["notes.mem"])
    catalog, tag = find_image(folder / "001-a.mem")
    assert [link.layer.path for link in catalog.chain(tag)] == names[:2]
    assert is_image(folder / "002-b.mem")
    assert not is_image(folder / "notes.mem")
    with pytest.raises(FileAccessError, match="neither a snapshot directory nor a numbered"):
        find_image(folder / "notes.mem")


@pytest.mark.parametrize(("name", "reason"), [("", "an empty path"), ("none", "No such file")])
def test_a_path_that_names_nothing_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match=reason):
        find_image(name and tmp_path / name)


def test_a_file_of_another_format_is_declined_by_its_format(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"QFI\xfb" + bytes(4092))
    with pytest.raises(ForeignFormatError, match="disk"):
        find_image(tmp_path / "disk")
