"""Cloud Hypervisor's snapshots: merged only where both range tables are equal and fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffmergefs import apply_diff, open_chain, open_image
from diffmergefs.core.errors import BrokenChainError, DiffMergeError, FileAccessError
from diffmergefs.stores import cloudhypervisor
from diffmergefs.stores.catalog import read_catalog
from tests.support.cloudhypervisor import TABLE, state, write_snapshot
from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.images import PAGE, overlay_oracle
from tests.support.stores import SIZE, pages, write_tag
from tests.support.subjects.cloudhypervisor import BASE, LEAF, store

__all__ = ["store"]

WORK = overlay_oracle(SIZE, [BASE, pages(1, [1])])


def reason(store: Path, tag: str = "leaf") -> str:
    with pytest.raises(DiffMergeError) as caught:
        read_catalog(str(store)).chain(tag)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def write_state(store: Path, found: object, tag: str = "work") -> None:
    text = found if isinstance(found, str) else json.dumps(found)
    (store / tag / "state.json").write_text(text)


def test_a_chain_is_merged(store: Path, tmp_path: Path) -> None:
    catalog = read_catalog(str(store))
    assert catalog.layout == "cloud-hypervisor"
    assert [link.tag for link in catalog.chain("leaf")] == ["base", "work", "leaf"]
    assert {link.ranges for link in catalog.chain("leaf")} == {tuple(TABLE)}
    for tag, expected in (("work", WORK), ("leaf", LEAF)):
        with open_image(store / tag).view as view:
            assert view.read(0, SIZE) == expected
        succeed("flatten", store / tag, "-o", tmp_path / tag)
        assert (tmp_path / tag).read_bytes() == expected
    rows = json.loads(succeed("list", "--json", "--layout=cloud-hypervisor", store))
    assert [(row["tag"], row["state"]) for row in rows] == [
        ("base", "complete"),
        ("leaf", "complete"),
        ("work", "complete"),
    ]
    assert len(json.loads(succeed("info", "--json", store / "leaf"))["layers"]) == 3
    assert succeed("verify", store / "leaf").startswith("sound: 3 layers")


def test_with_holes_it_is_a_base_only_if_its_document_says_so(store: Path) -> None:
    folder = write_snapshot(store, "other", layer=3, numbers=[4])
    with pytest.raises(BrokenChainError) as caught:
        open_image(folder)
    remedy = 'write {"memory": "memory-ranges"} to it'
    assert "other/memory-ranges: has holes, and without a snapshot.json" in str(caught.value)
    assert str(caught.value).endswith(remedy)
    (folder / "snapshot.json").write_text('{"memory": "memory-ranges"}')
    with open_image(folder).view as view:
        assert view.read(0, SIZE) == overlay_oracle(SIZE, [pages(3, [4])])


@pytest.mark.parametrize(
    "other",
    [
        TABLE[::-1],
        [(0, SIZE)],
        [(PAGE, 10 * PAGE), TABLE[1]],
        [(0, 9 * PAGE), (1 << 32, 7 * PAGE)],
    ],
)
def test_images_with_other_tables_are_not_merged(store: Path, other: list[tuple[int, int]]) -> None:
    write_state(store, state(other))
    for tag in ("work", "leaf"):
        text = reason(store, tag)
        assert "work/memory-ranges" in text and "base/memory-ranges" in text
        assert "only if both tables are equal" in text
        assert f"{other[0][1]:#x}@{other[0][0]:#x}" in text and "0xa000@0x0" in text
    assert "equal" in mistake(3, "info", store / "work")
    done = diffmergefs("verify", store / "work")
    assert (done.returncode, "only if both tables are equal" in done.stdout) == (1, True)
    assert len(read_catalog(str(store)).chain("base")) == 1


def without(name: str) -> dict[str, Any]:
    found = state()
    del found["snapshots"][name]
    return found


def with_memory_state(value: object) -> dict[str, Any]:
    found = state()
    found["snapshots"]["memory-manager"]["snapshot_data"] = value
    return found


def entry(**fields: object) -> dict[str, Any]:
    return state(memory_ranges={"data": [fields]})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("", "not valid JSON"),
        ("[]", "holds a list"),
        ('{"snapshots": {}, "snapshots": {}}', "appears twice"),
        ({}, "no object 'snapshots'"),
        (without("memory-manager"), "no object 'memory-manager'"),
        (with_memory_state(None), "no object 'snapshot_data'"),
        (with_memory_state([1, 2]), "no object 'snapshot_data'"),
        (with_memory_state({"state": [123, 34]}), "before 40.0 cannot be read"),
        (with_memory_state({"state": "{"}), "the memory manager's state: not valid JSON"),
        (with_memory_state({"state": "[1]"}), "holds a list"),
        (with_memory_state({"state": "[" * 100000}), "not valid JSON"),
        (state(memory_ranges=None), "no object 'memory_ranges'"),
        (state(memory_ranges={"data": {}}), "no table of 1 to"),
        (state([]), "no table of 1 to"),
        (entry(gpa=0), "not of the form"),
        (entry(gpa=True, length=SIZE), "not of the form"),
        (entry(gpa=0.0, length=SIZE), "not of the form"),
        (entry(gpa="0", length=SIZE), "not of the form"),
        (state(memory_ranges={"data": [SIZE]}), "not of the form"),
        (entry(gpa=-1, length=SIZE), "a memory range of"),
        (entry(gpa=0, length=0), "a memory range of 0 bytes"),
        (entry(gpa=1 << 64, length=SIZE), "a memory range of"),
        (entry(gpa=(1 << 64) - 1, length=SIZE), "a memory range of"),
        (state([(0, 10 * PAGE), (9 * PAGE, 6 * PAGE)]), "overlap at 0x9000"),
        (state([(0, SIZE - PAGE)]), f"{SIZE} bytes, but the memory ranges in its state.json have"),
        (state([(0, SIZE + 1)]), f"have {SIZE + 1}"),
    ],
)
def test_a_state_that_is_malformed_or_does_not_fit_is_refused(
    store: Path, found: object, expected: str
) -> None:
    write_state(store, found)
    assert expected in reason(store, "work")
    assert expected in reason(store, "leaf")


def test_a_missing_or_huge_state_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloudhypervisor, "MAX_STATE", 4096)
    write_state(store, json.dumps(state()) + " " * 4096)
    assert "over 4096 bytes, too large for a state.json" in reason(store, "work")
    (store / "work" / "state.json").unlink()
    assert "work/state.json: No such file" in reason(store, "work")


def test_a_forkd_tag_that_records_such_an_image_is_held_to_its_table(store: Path) -> None:
    other = store.parent / "forkd"
    write_tag(other, "plain")
    (other / "kept").mkdir()
    for name in ("memory-ranges", "state.json"):
        (store / "base" / name).rename(other / "kept" / name)
    document = {"memory": str(other / "kept" / "memory-ranges"), "parent_tag": "plain"}
    (other / "mixed").mkdir()
    (other / "mixed" / "snapshot.json").write_text(json.dumps(document))
    catalog = read_catalog(str(other), "forkd")
    with pytest.raises(BrokenChainError, match="no Cloud Hypervisor memory ranges"):
        catalog.chain("mixed")


def test_explicit_images_are_held_to_their_tables(store: Path) -> None:
    base, diff = store / "base" / "memory-ranges", store / "work" / "memory-ranges"
    with open_chain(base, [diff]).view as view:
        assert view.read(0, SIZE) == WORK
    write_state(store, state(TABLE[::-1]))
    calls: list[Callable[[], object]] = [
        lambda: open_chain(base, [diff]),
        lambda: apply_diff(diff, base),
    ]
    for call in calls:
        with pytest.raises(BrokenChainError, match="only if both tables are equal"):
            call()
    assert base.read_bytes() == overlay_oracle(SIZE, [BASE])
    done = diffmergefs("verify", "--base", base, "--diff", diff)
    assert (done.returncode, "both tables are equal" in done.stdout) == (1, True)


def test_an_explicit_diff_must_be_recorded_as_one(store: Path) -> None:
    base, diff = store / "base" / "memory-ranges", store / "work" / "memory-ranges"
    document = store / "work" / "snapshot.json"
    for text in (None, "{}", '{"parent_tag": null}'):
        document.unlink() if text is None else document.write_text(text)
        with pytest.raises(BrokenChainError, match="writes complete images, whose holes are zeros"):
            open_chain(base, [diff])
        with open_chain(diff).view as view:  # alone, it is a base
            assert view.read(0, SIZE) == overlay_oracle(SIZE, [pages(1, [1])])
    document.write_text('{"parent_tag": "base"}')
    with pytest.raises(BrokenChainError, match=r"is a diff: the snapshot\.json"):
        open_chain(diff)


def test_an_image_merges_with_no_layer_of_another_kind(store: Path, tmp_path: Path) -> None:
    base, diff = store / "base" / "memory-ranges", store / "work" / "memory-ranges"
    plain = tmp_path / "plain"
    plain.write_bytes(diff.read_bytes())
    for layers in ((base, plain), (plain, diff)):
        with pytest.raises(BrokenChainError, match="no Cloud Hypervisor memory ranges"):
            open_chain(layers[0], [layers[1]])
    link = tmp_path / "link"
    link.symlink_to(base)  # by its file, not by its name
    with open_chain(link, [diff]).view as view:
        assert view.read(0, SIZE) == WORK
    with pytest.raises(FileAccessError):
        open_chain(store / "gone" / "memory-ranges", [diff])


def test_a_store_of_both_kinds_is_ambiguous(store: Path) -> None:
    write_tag(store, "native")
    with pytest.raises(BrokenChainError, match="--layout=forkd or --layout=cloud-hypervisor"):
        read_catalog(str(store))
    assert list(read_catalog(str(store), "forkd").snapshots) == ["native"]
    assert sorted(read_catalog(str(store), "cloud-hypervisor").snapshots) == [
        "base",
        "leaf",
        "work",
    ]
