"""Images that cannot be opened: what a store remembers of them, logs, and keeps alive."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.errors import (
    DenseDiffError,
    DiffMergeError,
    FileAccessError,
    LayerChangedError,
    UntrustedExtentsError,
    os_error,
)
from diffmergefs.core.layer import Layer
from diffmergefs.opening.images import open_image
from diffmergefs.opening.trust import Problem, TrustPolicy
from tests.support.logged import warnings
from tests.support.stores import (
    OLD_NS,
    SIZE,
    age,
    opened_beneath,
    write_tag,
)
from tests.support.subjects.served import looked, root

__all__ = ["root"]


def refuse_alignment(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have every diff refused as by law 4, and collect the paths that were judged."""
    asked: list[str] = []

    def refuse(layer: Layer, policy: TrustPolicy, *, complete: bool = False) -> list[Problem]:
        asked.append(layer.path)
        raise UntrustedExtentsError(f"{layer.path}: refused", "alignment")

    monkeypatch.setattr("diffmergefs.opening.images.require_trust", refuse)
    return asked


def test_a_refusal_is_remembered_and_logged_once_until_the_chain_changes(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = looked(root)
    asked = refuse_alignment(monkeypatch)
    for _ in range(3):
        with pytest.raises(UntrustedExtentsError, match=r"work/memory\.bin: refused"):
            store.open("work")
        with pytest.raises(UntrustedExtentsError):
            store.opened("work")
        store.look()
    assert asked == ["work/memory.bin"]
    assert warnings(caplog) == ["work: its memory file is not shown: work/memory.bin: refused"]
    monkeypatch.undo()
    age(root / "work" / "memory.bin", mtime_ns=OLD_NS + 1)
    store.look()
    assert store.opened("work") is None
    assert store.open("work").view.size == SIZE


def test_a_refused_chain_holds_no_layer_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = looked(root)
    refuse_alignment(monkeypatch)
    before = opened_beneath(root)
    for ask in (store.open, store.opened, store.opened):
        with pytest.raises(UntrustedExtentsError):
            ask("leaf")
        gc.collect()
        assert opened_beneath(root) == before


def test_the_traceback_of_a_refusal_does_not_grow(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = looked(root)
    refuse_alignment(monkeypatch)
    lengths = []
    for _ in range(4):
        with pytest.raises(UntrustedExtentsError) as caught:
            store.open("leaf")
        lengths.append(len(caught.traceback))
    assert lengths[1] == lengths[2] == lengths[3]


def test_an_empty_layer_is_never_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tag(tmp_path, "base", size=0, numbers=[])
    assert looked(tmp_path).tags() == []
    assert "base: not shown: base/memory.bin: is empty (0 bytes)" in warnings(caplog)[0]


def test_a_filled_diff_is_refused_and_a_complete_link_is_dense(root: Path) -> None:
    write_tag(root, "full", "base", numbers=range(16), layer=0)  # a merged image: like its parent
    filled = write_tag(root, "filled", "base", layer=6) / "memory.bin"
    filled.write_bytes(filled.read_bytes())
    age(filled)
    store = looked(root)
    assert store.open("full") and open_image(root / "full").dense
    with pytest.raises(DenseDiffError, match="holes were filled"):
        store.open("filled")


@pytest.mark.parametrize("error", [FileAccessError("no"), LayerChangedError("no")])
def test_a_passing_failure_is_not_remembered(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    store = looked(root)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("diffmergefs.fuse.served.open_snapshot", fail)
        with pytest.raises(type(error)):
            store.open("leaf")
    assert store.opened("leaf") is None
    assert store.open("leaf").view.size == SIZE


def test_a_kept_error_keeps_nothing_else_alive(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps no frames of its traceback, and so no layer that a caller holds in one."""
    store = looked(root)
    refuse_alignment(monkeypatch)

    def caller() -> weakref.ref[object]:
        layers = [store.open_layer(link.layer) for link in store.chain("work") or []]
        with pytest.raises(UntrustedExtentsError, match="refused") as first:
            store.open("work")
        with pytest.raises(UntrustedExtentsError, match="refused") as second:
            store.opened("work")
        assert (first.value.check, str(first.value)) == (second.value.check, str(second.value))
        assert second.value is not first.value
        return weakref.ref(layers[0])

    held = caller()
    gc.collect()
    assert held() is None


@pytest.mark.parametrize(
    ("harm", "number"),
    [
        (lambda path: path.with_name("other").rename(path), errno.EBUSY),
        (lambda path: path.unlink(), errno.ENOENT),
        (lambda path: path.parent.rename(path.parent.with_name("away")), errno.ENOENT),
        (lambda path: age(path, mtime_ns=OLD_NS + 1), errno.EBUSY),
    ],
    ids=["replaced", "removed", "renamed", "changed"],
)
def test_what_the_next_look_will_find_is_no_error_of_the_storage(
    root: Path, harm: Callable[[Path], object], number: int
) -> None:
    path = root / "work" / "memory.bin"
    shutil.copy(path, path.with_name("other"))
    store = looked(root)
    harm(path)
    with pytest.raises(DiffMergeError, match="work") as caught:
        store.open("work")
    assert caught.value.errno == number


@pytest.mark.parametrize(
    ("failure", "number"), [(errno.ESTALE, errno.EBUSY), (errno.EACCES, errno.EIO)]
)
def test_a_layer_that_fails_at_its_path_is_an_error_of_the_storage_unless_it_was_replaced(
    failure: int, number: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = looked(root)

    def fails(*arguments: object) -> None:
        raise os_error(failure, "work/memory.bin")

    monkeypatch.setattr("diffmergefs.fuse.tags.view_access", fails)
    with pytest.raises(FileAccessError, match=f"work: {os.strerror(failure)}") as caught:
        store.open("work")
    assert caught.value.errno == number
