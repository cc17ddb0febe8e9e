"""Findings on a path, and on a filesystem whose answers are replaced."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.checks import doctor
from diffmergefs.checks.diagnosis import Finding
from diffmergefs.checks.doctor import examine_path
from diffmergefs.core import sparse
from diffmergefs.core.errors import BrokenChainError, FileAccessError
from diffmergefs.core.extents import Extent, ExtentList
from tests.support.commands import diffmergefs
from tests.support.images import PAGE, write_layer
from tests.support.inputs import unchanged
from tests.support.stores import SIZE, opened_beneath, write_document, write_numbered, write_tag
from tests.support.subjects.doctor import CHECKS, examined, memory, of, probed, store

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


def test_a_filesystem_that_reports_all_as_data_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "data_extents", lambda _, size: iter([Extent(0, size)]))
    found = probed(tmp_path)
    assert f"but {16 << 20} bytes of data" in found["grain"].finding
    assert [found[check].severity for check in ("grain", "zeros")] == ["wrong", "fine"]


def test_a_filesystem_that_makes_holes_of_zeros_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = sparse.data_extents

    def without_zeros(fd: int, size: int) -> Iterator[tuple[int, int]]:
        return (
            (start, stop)
            for start, stop in walk(fd, size)
            if any(os.pread(fd, stop - start, start))
        )

    monkeypatch.setattr(sparse, "data_extents", without_zeros)
    found = probed(tmp_path)
    assert [found[check].severity for check in ("grain", "zeros")] == ["fine", "wrong"]


def test_a_filesystem_without_mappings_is_tried_out_but_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert list(probed(tmp_path)) == [check for check in CHECKS if check != "mappings"]


def test_no_leases_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control = fcntl.fcntl

    def without(fd: int, command: int, *rest: Any) -> Any:
        if command == fcntl.F_SETLEASE:
            raise OSError(22, "Invalid argument")
        return control(fd, command, *rest)

    monkeypatch.setattr(fcntl, "fcntl", without)
    assert probed(tmp_path)["lease"].severity == "warning"


def test_a_filesystem_without_unnamed_files_is_tried_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False)
    monkeypatch.delattr(os, "O_TMPFILE")
    assert list(probed(tmp_path)) == CHECKS
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(doctor.examine_filesystem(str(tmp_path / "gone")))
