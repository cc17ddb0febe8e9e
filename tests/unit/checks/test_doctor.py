"""`doctor`: every finding on diffs that copies, writers and filesystems have harmed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from diffmergefs.checks.diagnosis import Finding
from diffmergefs.checks.doctor import examine_path
from diffmergefs.core import sparse
from diffmergefs.core.errors import BrokenChainError, FileAccessError
from diffmergefs.core.extents import ExtentList
from tests.support.commands import diffmergefs
from tests.support.images import PAGE, write_layer
from tests.support.inputs import unchanged
from tests.support.stores import (
    SIZE,
    opened_beneath,
    write_document,
    write_numbered,
    write_tag,
)
from tests.support.subjects.doctor import examined, memory, of, store

__all__ = ["store"]


def shown(found: list[Finding]) -> list[tuple[str, str, str]]:
    return [(os.path.relpath(f.subject, "/"), f.check, f.severity) for f in found]


def test_a_sound_store(store: Path) -> None:
    layers = [memory(store, tag) for tag in ("base", "work", "leaf")]
    with unchanged(layers):
        found = examined(store)
    assert [of(found, layer) for layer in layers] == [
        [("base", "fine")],
        [("extents", "fine"), ("no-seal", "warning")],
        [("extents", "fine"), ("no-seal", "warning")],
    ]
    assert len(found) == 5
    assert opened_beneath(store) == set()


@pytest.mark.parametrize("name", ["work", "work/memory.bin"])
def test_a_snapshot_or_its_layer_stands_for_its_chain(store: Path, name: str) -> None:
    subjects = [finding.subject for finding in examined(store / name)]
    assert list(dict.fromkeys(subjects)) == [str(memory(store, t)) for t in ("base", "work")]


def test_numbered_layers(tmp_path: Path) -> None:
    names = ["000-base.mem", "001-work.mem", "002-leaf.mem"]
    folder = write_numbered(tmp_path / "layers", names)
    assert {f.subject for f in examined(folder)} == {f"{folder}/{name}" for name in names}
    chain = {f.subject for f in examined(folder / names[1])}
    assert chain == {f"{folder}/{name}" for name in names[:2]}


def test_a_directory_without_snapshots_has_a_filesystem_only(tmp_path: Path) -> None:
    assert examined(tmp_path) == []
    found = list(examine_path(str(tmp_path)))
    assert found[-1].finding == "no snapshots here, so only its filesystem counts"


def test_a_broken_chain_does_not_hide_the_rest(store: Path) -> None:
    shutil.rmtree(store / "base")
    write_document(store, "leaf", "{")
    found = examined(store)
    assert of(found, memory(store, "work")) == [
        ("chain", "wrong"),
        ("extents", "fine"),
        ("no-seal", "warning"),
    ]
    assert of(found, store / "leaf") == [("chain", "wrong")]


def test_a_diff_of_another_size_is_wrong_once(store: Path) -> None:
    write_tag(store, "leaf", "work", layer=2, size=2 * SIZE)
    found = examined(store)
    (chain,) = (f for f in found if f.severity == "wrong")
    assert str(SIZE) in chain.finding and str(2 * SIZE) in chain.finding


def test_a_layer_that_cannot_be_opened_is_wrong(store: Path) -> None:
    memory(store, "work").unlink()
    os.mkfifo(memory(store, "work"))
    found = examined(store)
    assert ("chain", "wrong") in [(f.check, f.severity) for f in found]
    assert of(found, memory(store, "leaf"))[0] == ("chain", "wrong")


def test_everything_of_law_4_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diff = write_layer(tmp_path / "mem_diff", SIZE, [(PAGE, b"x" * PAGE)])
    data, some = ExtentList([(512, SIZE - 1)]), ExtentList([(0, PAGE)])
    monkeypatch.setattr(sparse, "walk", lambda fd, size: sparse.Walk(data, some, some, some))
    found = of(examined(diff), diff)
    checks = ["blocks", "alignment", "unwritten", "map", "map"]
    assert found == [(check, "wrong") for check in checks]


def test_layers_outside(store: Path, tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    outside = tmp_path / "pool" / "memory.bin"
    memory(store, "leaf").rename(outside)
    write_document(store, "leaf", json.dumps({"memory": str(outside), "parent_tag": "work"}))
    assert "chain" in [f.check for f in examined(store)]
    found = examined(store, allow_outside=(str(tmp_path / "pool"),))
    assert of(found, outside) == [("extents", "fine"), ("no-seal", "warning")]


def test_what_cannot_be_examined_raises(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="nowhere: No such file"):
        list(examine_path(str(tmp_path / "nowhere")))
    write_numbered(tmp_path, ["000-base.mem"])
    write_tag(tmp_path, "base")
    with pytest.raises(BrokenChainError, match="--layout"):
        list(examine_path(str(tmp_path)))


def test_a_page_size_that_is_none_is_a_mistake(tmp_path: Path) -> None:
    done = diffmergefs("doctor", "--page-size=3000", tmp_path)
    assert done.returncode == 2 and "not a power of two" in done.stderr
