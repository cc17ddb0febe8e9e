"""Reading a directory: chains, and the reasons why one is broken, by metadata alone."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import pytest

from diffmergefs.core import beneath
from diffmergefs.core.errors import (
    BrokenChainError,
    DiffMergeError,
    FileAccessError,
    SizeMismatchError,
)
from diffmergefs.stores import catalog
from diffmergefs.stores.catalog import read_catalog, resolve
from diffmergefs.stores.snapshot import Snapshot, status_of
from tests.support.images import PAGE
from tests.support.stores import (
    SIZE,
    opened_beneath,
    write_chain,
    write_document,
    write_numbered,
    write_tag,
)


def reason(store: Path, tag: str) -> str:
    with pytest.raises(DiffMergeError) as caught:
        read_catalog(str(store)).chain(tag)
    return str(caught.value)


def test_a_missing_parent_breaks_its_child_and_the_descendants(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "middle", "leaf"])
    (tmp_path / "base").rename(tmp_path.parent / f"{tmp_path.name}-gone")
    assert reason(tmp_path, "middle") == "parent 'base' of 'middle' is missing"
    assert reason(tmp_path, "leaf") == "parent 'base' of 'middle' is missing"


def test_an_unknown_tag_is_named(tmp_path: Path) -> None:
    assert reason(tmp_path, "nobody") == "no snapshot 'nobody'"


def test_what_can_be_reached_of_a_broken_chain(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "work", "leaf"])
    catalog = read_catalog(str(tmp_path))
    assert catalog.reachable("leaf") == catalog.chain("leaf")
    assert catalog.reachable("gone") == []
    write_tag(tmp_path, "base", "leaf")
    found = read_catalog(str(tmp_path)).reachable("work")
    assert [link.tag for link in found] == ["leaf", "base", "work"]
    write_tag(tmp_path, "base", "gone")
    assert [s.tag for s in read_catalog(str(tmp_path)).reachable("work")] == ["base", "work"]


def test_a_cycle_breaks_all_that_lead_into_it(tmp_path: Path) -> None:
    write_tag(tmp_path, "a", "c", layer=1)
    write_tag(tmp_path, "b", "a", layer=2)
    write_tag(tmp_path, "c", "b", layer=3)
    write_tag(tmp_path, "tail", "a", layer=4)
    write_tag(tmp_path, "self", "self", layer=5)
    for tag in ("a", "b", "c", "tail"):
        assert reason(tmp_path, tag).startswith("cycle: ")
    assert "self -> self" in reason(tmp_path, "self")


def test_a_size_mismatch_names_both_files_and_both_sizes(tmp_path: Path) -> None:
    write_tag(tmp_path, "base")
    write_tag(tmp_path, "work", "base", layer=1, size=SIZE + PAGE)
    write_tag(tmp_path, "leaf", "work", layer=2)
    for tag in ("work", "leaf"):
        with pytest.raises(SizeMismatchError) as caught:
            read_catalog(str(tmp_path)).chain(tag)
        text = str(caught.value)
        assert "work/memory.bin" in text and "base/memory.bin" in text
        assert str(SIZE) in text and str(SIZE + PAGE) in text
    assert len(read_catalog(str(tmp_path)).chain("base")) == 1


def test_descendants_of_a_broken_tag_name_the_ancestor_and_its_defect(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "middle", "leaf", "twig"])
    write_document(tmp_path, "middle", "nonsense")
    own = reason(tmp_path, "middle")
    assert own.startswith("middle/snapshot.json: not valid JSON")
    for tag in ("leaf", "twig"):
        assert reason(tmp_path, tag) == f"ancestor 'middle' is broken: {own}"
    assert len(read_catalog(str(tmp_path)).chain("base")) == 1


def test_a_rejected_tag_is_broken_and_so_are_its_descendants(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "middle", "leaf"])
    found = read_catalog(str(tmp_path))
    found.reject("middle", "because")
    with pytest.raises(BrokenChainError, match=r"^because$"):
        found.chain("middle")
    with pytest.raises(BrokenChainError, match=r"^ancestor 'middle' is broken: because$"):
        found.chain("leaf")


def test_layers_and_their_records_are_hidden(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "work"])
    assert read_catalog(str(tmp_path)).hidden == {
        "base/memory.bin",
        "base/memory.bin.bmap",
        "base/memory.bin.presence",
        "work/memory.bin",
        "work/memory.bin.bmap",
        "work/memory.bin.presence",
    }


def test_a_chain_of_1000_layers_is_whole_and_one_of_1001_refused(tmp_path: Path) -> None:
    write_numbered(tmp_path, [f"{n}-t{n}.mem" for n in range(1001)])
    found = read_catalog(str(tmp_path))
    assert [link.tag for link in found.chain("t999")] == [f"t{n}" for n in range(1000)]
    with pytest.raises(BrokenChainError, match="more than 1000 layers"):
        found.chain("t1000")


def test_a_tag_of_a_deep_chain_costs_steps_in_proportion_to_its_depth(tmp_path: Path) -> None:
    write_numbered(tmp_path, [f"{n}-t{n}.mem" for n in range(200)])
    found = read_catalog(str(tmp_path))
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            calls[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        for tag in found.snapshots:
            found.chain(tag)
            found.chain(tag)
    finally:
        sys.setprofile(None)
    # Each of the 200 chains is resolved once, and each resolved chain is compared link by link.
    assert calls["resolve"] == 200
    assert calls["require_equal_size"] <= 200 * 200 // 2


@pytest.mark.parametrize("make", [write_chain, write_numbered])
def test_no_image_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, list[str]], Path]
) -> None:
    make(tmp_path, ["0-base.mem", "1-work.mem"])
    opened: list[str] = []
    real_open, real_regular = os.open, beneath.open_regular

    def recording_open(path: str, *args: int, dir_fd: int | None = None) -> int:
        opened.append(os.path.basename(path))
        return real_open(path, *args, dir_fd=dir_fd)

    def recording_regular(root: int | None, path: str) -> int:
        opened.append(os.path.basename(path))
        return real_regular(root, path)

    monkeypatch.setattr(os, "open", recording_open)
    monkeypatch.setattr(beneath, "open_regular", recording_regular)
    found = read_catalog(str(tmp_path))
    assert len(found.chain("1-work.mem" if make is write_chain else "work")) == 2
    assert opened
    assert not {"memory.bin", "vmstate"} & set(opened)
    assert make is write_chain or not [name for name in opened if name.endswith(".mem")]


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "work"])
    write_document(tmp_path, "bad", '{"memory": 1}')
    before = len(os.listdir("/proc/self/fd")), opened_beneath(tmp_path)
    read_catalog(str(tmp_path))
    assert (len(os.listdir("/proc/self/fd")), opened_beneath(tmp_path)) == before


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_source_that_is_no_directory_is_refused_by_its_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileAccessError, match=f"{tmp_path / name}: "):
        read_catalog(str(tmp_path / name))


def test_an_open_descriptor_speaks_for_a_directory_that_was_renamed(tmp_path: Path) -> None:
    write_chain(tmp_path / "store", ["base"])
    fd = os.open(tmp_path / "store", os.O_RDONLY)
    try:
        (tmp_path / "store").rename(tmp_path / "moved")
        found = read_catalog(str(tmp_path / "store"), at=fd)
    finally:
        os.close(fd)
    assert set(found.snapshots) == {"base"}


def test_a_name_that_goes_while_it_is_looked_at_does_not_fail_the_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chain(tmp_path, ["base", "work"])
    (tmp_path / "fleeting").touch()
    real = status_of

    def vanish(entry: os.DirEntry[str]) -> os.stat_result | None:
        if entry.name == "fleeting":
            (tmp_path / "fleeting").unlink()
        return real(entry)

    monkeypatch.setattr(catalog, "status_of", vanish)
    found = read_catalog(str(tmp_path))
    assert len(found.chain("work")) == 2
    assert not (tmp_path / "fleeting").exists()
    assert not (tmp_path / "base" / "fleeting").exists()


def test_the_layer_of_a_tag_that_cannot_be_read_now_is_remembered(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "work"])
    older = read_catalog(str(tmp_path))
    write_document(tmp_path, "work", "{")
    (tmp_path / "base").rename(tmp_path.parent / f"{tmp_path.name}-gone")
    assert read_catalog(str(tmp_path)).hidden == set()
    found = read_catalog(str(tmp_path))
    found.recall(older)
    status = (tmp_path / "work" / "memory.bin").stat()
    work = "work/memory.bin"
    assert found.hidden == {work, f"{work}.bmap", f"{work}.presence"}
    assert found.layer_files == {(status.st_dev, status.st_ino)}
    latest = read_catalog(str(tmp_path))
    latest.recall(found)
    assert latest.hidden == found.hidden


def test_a_tags_own_defect_comes_before_its_ancestors(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "middle", "leaf"])
    found = read_catalog(str(tmp_path))
    for tag in ("base", "leaf"):
        found.reject(tag, f"because of {tag}")
    assert [str(raised(found, tag)) for tag in ("leaf", "middle")] == [
        "because of leaf",
        "ancestor 'base' is broken: because of base",
    ]


def raised(found: catalog.Catalog, tag: str) -> DiffMergeError:
    with pytest.raises(DiffMergeError) as caught:
        found.chain(tag)
    return caught.value


def resolved(head: str, parents: Mapping[str, str | None]) -> list[str]:
    links = {tag: Snapshot(tag, parent) for tag, parent in parents.items()}
    return [link.tag for link in resolve(head, links.get)]


def refusal(head: str, parents: Mapping[str, str | None]) -> str:
    with pytest.raises(BrokenChainError) as caught:
        resolved(head, parents)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_chain_is_base_first_and_holds_nothing_beside_it() -> None:
    parents = {"c": "b", "b": "a", "a": None, "child": "c", "sibling": "a", "broken": "none"}
    assert resolved("c", parents) == ["a", "b", "c"]
    assert resolved("a", parents) == ["a"]
    assert resolved("sibling", parents) == ["a", "sibling"]


def test_a_missing_snapshot_and_a_missing_parent_are_named() -> None:
    assert refusal("x", {}) == "no snapshot 'x'"
    assert refusal("c", {"c": "b", "b": "gone"}) == "parent 'gone' of 'b' is missing"


def test_an_empty_tag_as_parent_is_missing_and_no_end_of_the_chain() -> None:
    assert refusal("a", {"a": ""}) == "parent '' of 'a' is missing"


@pytest.mark.parametrize(
    ("parents", "cycle"),
    [
        ({"a": "a"}, "a -> a"),
        ({"a": "b", "b": "c", "c": "a"}, "a -> b -> c -> a"),
        ({"a": "b", "b": "c", "c": "b"}, "b -> c -> b"),
    ],
)
def test_a_cycle_is_told_without_the_way_to_it(parents: dict[str, str | None], cycle: str) -> None:
    assert f"cycle: {cycle}, " in refusal("a", parents)


def test_a_cycle_of_hundreds_is_told_in_a_short_line() -> None:
    parents: dict[str, str | None] = {f"t{n}": f"t{(n + 1) % 500}" for n in range(500)}
    expected = " -> ".join([*(f"t{n}" for n in range(8)), "492 more", "t0"])
    assert refusal("t0", parents) == (
        f"cycle: {expected}, each followed by its parent; a chain ends in a base"
    )


@pytest.mark.parametrize("depth", [1000, 1001])
def test_a_chain_has_at_most_a_thousand_layers(depth: int) -> None:
    parents: dict[str, str | None] = {"0": None} | {str(n): str(n - 1) for n in range(1, depth)}
    head = str(depth - 1)
    if depth == 1000:
        assert resolved(head, parents) == [str(n) for n in range(depth)]
    else:
        assert "more than 1000 layers" in refusal(head, parents)
