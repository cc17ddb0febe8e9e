"""What `doctor` finds in one layer: its bytes, its holes, its seal and its writers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.checks.diagnosis import examine_layer, wrong
from diffmergefs.core import sparse
from diffmergefs.core.errors import FileAccessError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.opening.content import Parents, Verdicts
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars.verified import Remembered
from diffmergefs.writing.sealing import seal_layer
from tests.support.images import PAGE, signed, write_layer
from tests.support.stores import SIZE, write_tag
from tests.support.subjects.doctor import examined, memory, of, store

__all__ = ["store"]


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
    assert f"{PAGE} bytes in 1 extent can be trusted" in found[-1].finding


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


def test_it_depends_on_the_parents_what_a_file_without_holes_is(tmp_path: Path) -> None:
    base = Layer.open(str(write_layer(tmp_path / "base", SIZE, [(0, signed(0, 0, SIZE))])))
    diff = Layer.open(str(write_layer(tmp_path / "diff", SIZE, [(0, bytes(SIZE))])))
    verdicts = Verdicts(Remembered(None))
    for parents, found in (
        (Parents(), [("base", "fine")]),
        (None, [("dense", "wrong")]),
        (Parents([base]), [("dense", "wrong")]),
    ):
        findings = list(examine_layer(diff, parents, TrustPolicy(), verdicts))
        assert [(f.check, f.severity) for f in findings] == found
    assert findings[0].finding.startswith("no hole, and of 16 pages that are not zeros below 16")


@pytest.mark.parametrize("check", ["chain", "access", "seal"])
def test_an_error_is_a_finding_with_a_reason_and_a_remedy(check: str) -> None:
    found = wrong("/a", check, FileAccessError("/a: as it was"))
    assert (found.subject, found.check, found.severity) == ("/a", check, "wrong")
    assert found.finding == "/a: as it was"
    assert found.why and found.remedy
