"""`verify`: all that is wrong with an image, in one go; nothing remembered is believed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.checks import verify
from diffmergefs.checks.verdict import Verdict
from diffmergefs.checks.verify import open_image, open_layers, open_store
from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.identity import FileVersion
from diffmergefs.core.layer import Layer
from diffmergefs.core.workers import in_threads
from diffmergefs.opening import pins
from diffmergefs.opening.pins import content_hash
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars import seal
from diffmergefs.sidecars.seal import compare_once
from diffmergefs.sidecars.verified import Identity, Remembered
from diffmergefs.stores.catalog import read_catalog
from diffmergefs.writing.sealing import seal_layer
from tests.support.images import PAGE, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.stores import (
    SIZE,
    opened_beneath,
    write_document,
    write_numbered,
    write_tag,
)
from tests.support.subjects.verify import ABSENT, root, sha256, state

__all__ = ["root", "state"]


def verified(path: Path, state: Path, **options: Any) -> Verdict:
    policy = TrustPolicy(state_dir=str(state), **options)
    with open_image(str(path), policy) as opened:
        return opened.verify()


def kinds(verdict: Verdict) -> list[str]:
    return [fault.kind for fault in verdict.faults]


def test_a_sound_chain(root: Path, state: Path) -> None:
    with unchanged(sorted(root.rglob("memory.bin"))):
        verdict = verified(root / "leaf", state)
    assert verdict.sound and not verdict.faults and not verdict.overridden
    assert [(v.tag, v.path, v.size, v.pin) for v in verdict.layers] == [
        ("base", f"{root}/base/memory.bin", SIZE, None),
        ("work", f"{root}/work/memory.bin", SIZE, "verified"),
        ("leaf", f"{root}/leaf/memory.bin", SIZE, "verified"),
    ]
    assert opened_beneath(root) == set()


def test_every_wrong_pin_is_a_fault(root: Path, state: Path) -> None:
    write_tag(root, "leaf", "work", layer=2, parent_content_hash=ABSENT)
    write_layer(root / "base" / "memory.bin", SIZE, [(0, signed(9, 0, PAGE))])
    verdict = verified(root / "leaf", state)
    assert kinds(verdict) == ["pin", "pin"]
    first, second = (fault.message for fault in verdict.faults)
    assert first.startswith(f"{root}/base/memory.bin: its sha256 is ") and "'work'" in first
    assert second.startswith(f"{root}/work/memory.bin: its sha256 is ") and ABSENT in second
    assert [v.pin for v in verdict.layers] == [None, "wrong", "wrong"]


def test_a_missing_parent_does_not_hide_what_is_wrong_above(root: Path, state: Path) -> None:
    write_tag(root, "leaf", "work", layer=2, parent_content_hash=ABSENT)
    (root / "base").rename(root.parent / "away")
    verdict = verified(root / "leaf", state)
    assert kinds(verdict) == ["chain", "pin"]
    assert verdict.faults[0].message == "parent 'base' of 'work' is missing"
    assert [(v.tag, v.pin) for v in verdict.layers] == [("work", "unknown"), ("leaf", "wrong")]


def test_a_cycle_is_named_and_its_pins_are_checked(root: Path, state: Path) -> None:
    write_tag(root, "base", "leaf", layer=3, parent_content_hash=ABSENT)
    verdict = verified(root / "leaf", state)
    assert kinds(verdict)[0] == "chain"
    assert "cycle: leaf -> work -> base -> leaf" in verdict.faults[0].message
    assert [fault.message.split(":")[0] for fault in verdict.faults[1:]] == [
        f"{root}/base/memory.bin"
    ]


def test_bad_metadata_in_the_middle(root: Path, state: Path) -> None:
    write_document(root, "work", '{"memory": 1}')
    verdict = verified(root / "leaf", state)
    assert kinds(verdict) == ["chain"]
    assert "work/snapshot.json: 'memory' is a int" in verdict.faults[0].message
    assert [(v.tag, v.path, v.pin) for v in verdict.layers] == [
        ("work", None, None),
        ("leaf", f"{root}/leaf/memory.bin", "unknown"),
    ]


def test_every_wrong_size_and_untrusted_extent_is_a_fault(root: Path, state: Path) -> None:
    write_layer(root / "work" / "memory.bin", SIZE + PAGE, [])
    # With guest pages of 8 KiB, one that begins in the middle.
    write_tag(root, "leaf", "work", layer=3)
    write_tag(root, "top", "leaf", layer=4)
    verdict = verified(root / "top", state, page_size=2 * PAGE)
    assert kinds(verdict) == ["size", "extents", "extents"]
    paths = [fault.message.split(":")[0] for fault in verdict.faults]
    assert paths == [f"{root}/work/memory.bin", f"{root}/leaf/memory.bin", f"{root}/top/memory.bin"]
    assert str(SIZE) in verdict.faults[0].message and str(SIZE + PAGE) in verdict.faults[0].message


def test_extents_below_a_gap_and_above_it_are_judged(root: Path, state: Path) -> None:
    write_tag(root, "leaf", "work", layer=3)
    (root / "work" / "memory.bin").unlink()
    (root / "work" / "memory.bin").mkdir()
    verdict = verified(root / "leaf", state, page_size=2 * PAGE)
    assert kinds(verdict) == ["chain", "extents"]


def test_above_a_gap_no_diff_is_compared_with_what_lies_below_it(root: Path, state: Path) -> None:
    write_layer(root / "work" / "memory.bin", SIZE + PAGE, [])
    leaf = write_tag(root, "leaf", "work", layer=2) / "memory.bin"
    leaf.write_bytes(leaf.read_bytes())
    assert kinds(verified(root / "leaf", state)) == ["size"]


def test_a_filled_diff_is_a_fault_and_can_be_vouched_for(root: Path, state: Path) -> None:
    leaf = root / "leaf" / "memory.bin"
    leaf.write_bytes(leaf.read_bytes())
    assert kinds(verified(root / "leaf", state)) == ["dense"]
    assert verified(root / "leaf", state, dense=True).sound


def test_what_trust_grain_overrides_is_told(root: Path, state: Path) -> None:
    verdict = verified(root / "leaf", state, page_size=2 * PAGE, trust_grain={"all"})
    assert verdict.sound
    assert [line.split(":")[1].strip() for line in verdict.overridden] == [
        f"{root}/work/memory.bin",
        f"{root}/leaf/memory.bin",
    ]


def test_an_unreadable_layer_is_a_fault_and_the_others_are_checked(
    root: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_base(layer: Layer, *arguments: Any) -> str:
        if layer.path == f"{root}/base/memory.bin":
            raise OSError(5, "Input/output error")
        return content_hash(layer, *arguments)

    monkeypatch.setattr(pins, "content_hash", fail_at_base)
    verdict = verified(root / "leaf", state)
    assert [(fault.kind, fault.message) for fault in verdict.faults] == [
        ("access", f"{root}/base/memory.bin: Input/output error")
    ]
    assert [v.pin for v in verdict.layers] == [None, "unknown", "verified"]


def test_a_layer_that_changes_meanwhile_is_a_fault(
    root: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch_and_hash(layer: Layer, *arguments: Any) -> str:
        os.utime(f"/proc/self/fd/{layer.fd}")
        return content_hash(layer, *arguments)

    monkeypatch.setattr(pins, "content_hash", touch_and_hash)
    assert kinds(verified(root / "leaf", state)) == ["changed", "changed"]


def test_unpinned_is_no_fault(tmp_path: Path, state: Path) -> None:
    names = [f"00{n}-n{n}.mem" for n in range(3)]
    write_numbered(tmp_path / "layers", names)
    verdict = verified(tmp_path / "layers" / names[2], state)
    assert verdict.sound
    assert [v.pin for v in verdict.layers] == [None, "unpinned", "unpinned"]


def test_explicit_layers_have_no_pins(root: Path, state: Path) -> None:
    base, work = (str(root / tag / "memory.bin") for tag in ("base", "work"))
    with open_layers(base, [work], TrustPolicy(state_dir=str(state))) as opened:
        assert opened.total_bytes == 0
        verdict = opened.verify()
    assert verdict.sound
    assert [(v.tag, v.path, v.pin) for v in verdict.layers] == [
        (None, base, None),
        (None, work, None),
    ]
    with open_layers(base, [work, "/nowhere", work[:-3]], TrustPolicy()) as opened:
        faults = opened.verify().faults
    assert [(fault.kind, fault.message.split(":")[0]) for fault in faults] == [
        ("access", "/nowhere"),
        ("access", work[:-3]),
    ]


def test_an_explicit_diff_without_a_hole_is_a_fault(root: Path) -> None:
    base = str(root / "base" / "memory.bin")
    full = str(write_layer(root / "full", SIZE, [(0, signed(1, 0, SIZE))]))
    with open_layers(base, [full], TrustPolicy()) as opened:
        assert kinds(opened.verify()) == ["dense"]
    with open_layers(base, [full], TrustPolicy(dense=True)) as opened:
        assert opened.verify().sound


def test_what_is_no_image_is_refused(root: Path) -> None:
    for path in (root / "nobody", root, root / "leaf" / "vmstate"):
        with pytest.raises(DiffMergeError):
            open_image(str(path), TrustPolicy())


def test_nothing_remembered_is_believed_and_what_proves_right_is_remembered(
    root: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Identity, "is_final", lambda identity, since_ns: True)
    base = root / "base" / "memory.bin"
    identity = Identity(str(base), FileVersion.of(base.stat()))
    Remembered(str(state)).remember("sha256", identity, sha256(base))
    read: list[str] = []

    def counted(layer: Layer, *arguments: Any) -> str:
        read.append(layer.path)
        return content_hash(layer, *arguments)

    monkeypatch.setattr(pins, "content_hash", counted)
    assert verified(root / "leaf", state).sound
    assert sorted(read) == [f"{root}/base/memory.bin", f"{root}/work/memory.bin"]
    work = root / "work" / "memory.bin"
    identity = Identity(str(work), FileVersion.of(work.stat()))
    assert Remembered(str(state)).recall("sha256", identity) == sha256(work)


def test_progress_adds_up_to_the_total(root: Path, state: Path) -> None:
    done: list[int] = []
    with open_image(str(root / "leaf"), TrustPolicy(state_dir=str(state))) as opened:
        assert opened.total_bytes == 2 * SIZE
        opened.verify(done.append)
    assert sum(done) == 2 * SIZE


def test_files_are_read_at_the_same_time(
    root: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2)

    def meet_and_hash(layer: Layer, *arguments: Any) -> str:
        together.wait(30)
        return content_hash(layer, *arguments)

    monkeypatch.setattr(pins, "content_hash", meet_and_hash)
    with open_image(str(root / "leaf"), TrustPolicy(state_dir=str(state))) as opened:
        assert opened.verify(jobs=2).sound


def test_there_are_as_many_threads_as_asked_for(
    root: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def recorded(work: Any, items: Any, jobs: int, stop: Any) -> Any:
        asked.append(jobs)
        return in_threads(work, items, jobs, stop)

    monkeypatch.setattr(verify, "in_threads", recorded)
    with open_image(str(root / "leaf"), TrustPolicy(state_dir=str(state))) as opened:
        assert opened.verify(jobs=1).sound
        opened.verify()
    assert asked == [1, os.cpu_count()]


def test_without_another_thread_the_caller_reads_all_files(
    root: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with open_image(str(root / "leaf"), TrustPolicy(state_dir=str(state))) as opened:
        assert opened.verify(jobs=2).sound


def test_what_fails_in_one_thread_ends_the_others(
    root: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2)
    blocks = iter(range(3000))

    def meet_and_report(layer: Layer, report: Callable[[int], None]) -> str:
        together.wait(30)
        for _ in blocks:
            report(1)
            time.sleep(0.01)
        return "never"

    def interrupt(done: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(pins, "content_hash", meet_and_report)
    opened = open_image(str(root / "leaf"), TrustPolicy(state_dir=str(state)))
    with opened, pytest.raises(KeyboardInterrupt):
        opened.verify(interrupt, jobs=2)
    assert next(blocks, None) is not None


# A whole directory


def verdicts_on(store: Path, state: Path, **options: Any) -> dict[str, Verdict]:
    policy = TrustPolicy(state_dir=str(state), **options)
    with open_store(read_catalog(str(store)), policy) as opened:
        return opened.verify_all()


def test_all_snapshots_of_a_directory_are_checked_parents_first(root: Path, state: Path) -> None:
    write_tag(root, "a-branch", "base", layer=3)
    verdicts = verdicts_on(root, state)
    assert list(verdicts) == ["base", "a-branch", "work", "leaf"]
    assert all(verdict.sound for verdict in verdicts.values())
    for tag, verdict in verdicts.items():
        assert verdict == verified(root / tag, state)
    assert opened_beneath(root) == set()


def test_faults_are_those_of_each_image_and_of_no_other(root: Path, state: Path) -> None:
    write_tag(root, "work", "base", layer=1, parent_content_hash=ABSENT)
    write_tag(root, "orphan", "nobody", layer=4)
    write_tag(root, "other", "base", layer=5)
    write_document(root, "bad", "{")
    verdicts = verdicts_on(root, state)
    assert {tag: kinds(verdict) for tag, verdict in verdicts.items()} == {
        "base": [],
        "other": [],
        "work": ["pin"],
        "leaf": ["pin"],
        "orphan": ["chain"],
        "bad": ["chain"],
    }
    for tag, verdict in verdicts.items():
        assert verdict.faults == verified(root / tag, state).faults


def test_each_layer_is_read_once_however_many_images_have_it(
    root: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tag(root, "other", "work", layer=3, parent_content_hash=sha256(root / "work/memory.bin"))
    for tag in ("base", "work", "leaf"):
        seal_layer(root / tag / "memory.bin", policy=TrustPolicy(dense=True))
    read: list[str] = []
    compared: list[str] = []

    def counted(layer: Layer, *arguments: Any) -> str:
        read.append(layer.path)
        return content_hash(layer, *arguments)

    def compared_once(layer: Layer, *arguments: Any, **options: Any) -> None:
        compared.append(layer.path)
        compare_once(layer, *arguments, **options)

    monkeypatch.setattr(pins, "content_hash", counted)
    monkeypatch.setattr(seal, "compare_once", compared_once)
    done: list[int] = []
    with open_store(read_catalog(str(root)), TrustPolicy(state_dir=str(state))) as opened:
        assert all(verdict.sound for verdict in opened.verify_all(done.append, jobs=2).values())
        assert sum(done) == opened.total_bytes
    paths = [f"{root}/{tag}/memory.bin" for tag in ("base", "leaf", "work")]
    assert sorted(read) == [paths[0], paths[2]]
    assert sorted(compared) == paths


def test_a_cycle_in_a_directory_is_a_fault_of_each_of_its_snapshots(
    root: Path, state: Path
) -> None:
    write_tag(root, "base", "leaf", layer=3)
    verdicts = verdicts_on(root, state)
    assert all(kinds(verdict)[0] == "chain" for verdict in verdicts.values())
    assert {verdict.faults[0].message.split(",")[0] for verdict in verdicts.values()} == {
        "cycle: base -> leaf -> work -> base",
        "cycle: leaf -> work -> base -> leaf",
        "cycle: work -> base -> leaf -> work",
    }
