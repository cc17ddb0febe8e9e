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
from diffmergefs.core.layer import Layer
from diffmergefs.writing.sealing import seal_layer
from tests.support.commands import diffmergefs
from tests.support.images import PAGE, signed, write_layer
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


def test_a_layer_that_changes_while_it_is_read_is_wrong(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Layer, buffer: memoryview, offset: int, *, nowait: bool = False) -> None:
        raise OSError(5, "Input/output error")

    memory(store, "work").write_bytes(signed(1, 0, SIZE))
    monkeypatch.setattr(Layer, "read_into", failing)
    found = examined(store)
    assert of(found, memory(store, "work")) == [("access", "wrong")]
    assert all("Input/output error" in f.finding for f in found if f.check == "access")


@pytest.mark.parametrize("tag", ["base", "work"])
def test_a_layer_with_a_writer_is_wrong(store: Path, tag: str) -> None:
    with memory(store, tag).open("r+b"):
        found = examined(store / "work")
    assert ("writer", "wrong") in of(found, memory(store, tag))
    assert [f.check for f in found if f.severity == "wrong"] == ["writer"]


def test_a_diff_whose_holes_a_copy_has_filled_is_wrong(store: Path) -> None:
    layer = memory(store, "work")
    layer.write_bytes(layer.read_bytes())
    (zeros, *rest) = (f for f in examined(store / "work") if f.subject == str(layer))
    assert (zeros.check, zeros.severity, rest) == ("dense", "wrong", [])
    assert zeros.finding.startswith("no hole, and of 15 pages that are not zeros below 14 are")


def test_a_complete_image_is_fine(store: Path) -> None:
    memory(store, "work").write_bytes(signed(1, 0, 3 * PAGE) + signed(0, 3 * PAGE, SIZE - 3 * PAGE))
    found = of(examined(store / "work"), memory(store, "work"))
    assert found == [("dense", "fine"), ("no-seal", "warning")]


def test_the_share_of_zeros_says_nothing(store: Path) -> None:
    # Guests wipe what they free: under init_on_free 0.95 of a healthy diff's pages were zeros.
    layer = memory(store, "work")
    write_layer(layer, SIZE, [(0, bytes(7 * PAGE)), (9 * PAGE, b"x" * PAGE)])
    assert of(examined(store / "work"), layer) == [("extents", "fine"), ("no-seal", "warning")]


def test_what_fails_a_check_is_not_called_trusted(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = sparse.walk
    preallocated = ExtentList([(0, PAGE)])
    monkeypatch.setattr(
        sparse, "walk", lambda fd, size: walk(fd, size)._replace(unwritten=preallocated)
    )
    found = of(examined(store / "work"), memory(store, "work"))
    assert found == [("unwritten", "wrong")]


def test_pages_that_were_zeros_before_do_not_count(store: Path) -> None:
    write_tag(store, "base", numbers=[0])
    write_layer(memory(store, "work"), SIZE, [(PAGE, bytes(8 * PAGE)), (0, b"x" * PAGE)])
    found = of(examined(store / "work"), memory(store, "work"))
    assert found == [("extents", "fine"), ("no-seal", "warning")]


def test_a_sealed_diff(store: Path) -> None:
    layer = memory(store, "work")
    write_layer(layer, SIZE, [(0, bytes(8 * PAGE))])
    seal_layer(layer)
    found = examined(store / "work")
    assert of(found, layer.with_name("memory.bin.bmap")) == [("seal", "fine")]
    # The seal says that the guest wrote these zeros.
    assert of(found, layer) == [("extents", "fine")]


def test_a_copy_that_was_harmed_is_fine_with_its_seal(store: Path) -> None:
    layer = memory(store, "work")
    seal_layer(layer)
    layer.write_bytes(layer.read_bytes())
    found = examined(store / "work")
    (newer,) = (f for f in found if f.check == "newer")
    assert newer.severity == "warning" and newer.subject == f"{layer}.bmap"
    assert of(found, layer) == [("extents", "fine")]


def test_a_stale_seal_is_wrong_and_hides_nothing(store: Path) -> None:
    layer = memory(store, "work")
    seal_layer(layer)
    write_layer(layer, SIZE, [(5 * PAGE, b"x" * PAGE)])
    found = examined(store / "work")
    (seal,) = (f for f in found if f.subject == f"{layer}.bmap")
    assert (seal.check, seal.severity) == ("seal", "wrong") and "stale seal" in seal.finding
    # The filesystem's extents count then, and nobody is told to seal it as it is.
    assert of(found, layer) == [("extents", "fine")]
    assert f"{PAGE} bytes in 1 extents" in found[-1].finding


def test_a_seal_is_compared_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal_layer(memory(store, "work"))
    os.utime(memory(store, "work"), ns=(10**18, 10**18))
    monkeypatch.setattr("diffmergefs.sidecars.verified.COARSE_TICK_NS", 0)
    monkeypatch.setattr("diffmergefs.sidecars.verified.TICK_NS", 0)
    examined(store / "work", state_dir=str(tmp_path / "state"))
    compared: list[str] = []
    monkeypatch.setattr(
        "diffmergefs.sidecars.seal.compare", lambda layer, *_: compared.append(layer.path)
    )
    found = examined(store / "work", state_dir=str(tmp_path / "state"))
    assert compared == [] and ("seal", "fine") in [(f.check, f.severity) for f in found]


def test_a_lone_file_is_judged_as_a_diff(tmp_path: Path) -> None:
    diff = write_layer(tmp_path / "mem_diff", SIZE, [(PAGE, b"x" * PAGE)])
    assert of(examined(diff), diff) == [("extents", "fine"), ("no-seal", "warning")]
    diff.write_bytes(bytes(SIZE))
    assert of(examined(diff), diff) == [("dense", "wrong")]
    diff.write_bytes(b"")
    assert of(examined(diff), diff) == [("access", "wrong")]


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
