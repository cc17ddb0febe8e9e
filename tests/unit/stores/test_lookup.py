"""Which image, and of which layout, a path that a user gives means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffmergefs.core.errors import BrokenChainError, FileAccessError, ForeignFormatError
from diffmergefs.stores.lookup import find_image, find_store, is_image, layout_of
from tests.support.images import write_layer
from tests.support.stores import SIZE, write_chain, write_document, write_numbered, write_tag
from tests.support.superserve import write_template


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


def test_a_memory_file_in_a_snapshot_directory_is_that_snapshot(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "leaf"])
    (tmp_path / "link").symlink_to(store)
    for path in (store / "leaf" / "memory.bin", tmp_path / "link" / "leaf" / "memory.bin"):
        catalog, tag = find_image(path)
        assert [link.tag for link in catalog.chain(tag)] == ["base", "leaf"]
        assert is_image(path)
    with pytest.raises(FileAccessError, match="nor the memory file of a snapshot"):
        find_image(store / "leaf" / "vmstate")
    assert not is_image(store / "leaf" / "vmstate")
    loose = write_layer(tmp_path / "memory.bin", SIZE, [])
    assert not is_image(loose)


def test_a_path_as_below_a_mount_is_an_image_in_every_layout(tmp_path: Path) -> None:
    numbered = write_numbered(tmp_path / "layers", ["000-base.mem", "001-a.mem"])
    forkd = write_chain(tmp_path / "store", ["base"])
    write_tag(forkd, "leaf", "base", memory="inner.mem")
    (forkd / "shared").mkdir()
    (forkd / "leaf" / "inner.mem").rename(forkd / "shared" / "inner.mem")
    write_document(
        forkd, "leaf", json.dumps({"memory": str(forkd / "shared/inner.mem"), "parent_tag": "base"})
    )
    deep = tmp_path / "deep"
    write_template(deep)
    for path in (
        numbered / "a",
        numbered / "a" / "001-a.mem",
        forkd / "leaf" / "inner.mem",
        deep / "templates+python",
        deep / "templates+python" / "mem.snap",
    ):
        assert not path.exists()
        catalog, tag = find_image(path)
        assert tag in path.parts and catalog.chain(tag)
        assert is_image(path)
    for path in (numbered / "a" / "000-base.mem", numbered / "a" / "x" / "y", numbered / "z"):
        with pytest.raises(FileAccessError, match="No such file"):
            find_image(path)
        assert not is_image(path)


def test_a_missing_path_in_a_directory_of_snapshots_names_those(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "leaf"])
    with pytest.raises(FileAccessError) as caught:
        find_image(store / "laef")
    assert str(caught.value) == (
        f"{store}/laef: No such file or directory; the snapshots there are base, leaf"
    )


def test_a_directory_of_snapshots_is_no_image_and_its_snapshots_are_named(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "leaf"])
    layers = write_numbered(tmp_path / "layers", ["000-base.mem", "001-a.mem"])
    for folder, tag in ((store, "leaf"), (layers, "a")):
        with pytest.raises(BrokenChainError) as caught:
            find_image(folder)
        named = ", ".join(f"{folder}/{name}" for name in sorted(["base", tag]))
        assert str(caught.value) == (
            f"{folder}: is a directory of 2 snapshots, not one of them; name one: {named}"
        )
        assert find_image(folder / tag)[1] == tag


def test_a_store_is_a_directory_of_snapshots_and_no_snapshot(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "leaf"])
    found = find_store(str(store), None, None)
    assert found is not None and sorted(found.snapshots) == ["base", "leaf"]
    for other in (store / "leaf", store / "leaf" / "memory.bin", store / "nothing"):
        assert find_store(str(other), None, None) is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(BrokenChainError, match="neither a snapshot nor a directory of snapshots"):
        find_store(str(tmp_path / "empty"), None, None)
    layers = write_numbered(tmp_path / "layers", ["000-base.ram", "001-a.ram"])
    with pytest.raises(BrokenChainError, match="--suffix"):
        find_store(str(layers), None, None)
    found = find_store(str(layers), None, "ram")
    assert found is not None and sorted(found.snapshots) == ["a", "base"]


@pytest.mark.parametrize(("name", "reason"), [("", "an empty path"), ("none", "No such file")])
def test_a_path_that_names_nothing_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match=reason):
        find_image(name and tmp_path / name)


def test_a_file_of_another_format_is_declined_by_its_format(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"QFI\xfb" + bytes(4092))
    with pytest.raises(ForeignFormatError, match="disk"):
        find_image(tmp_path / "disk")
