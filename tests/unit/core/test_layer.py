"""One layer: what opening it does, exact reads, and the end of its descriptor."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import pickle
from pathlib import Path

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.errors import (
    FileAccessError,
    ForeignFormatError,
    LayerChangedError,
    SizeMismatchError,
)
from diffmergefs.core.identity import FileKey
from diffmergefs.core.layer import Layer, LayerExtents, LayerFacts, Record
from diffmergefs.core.view import MergedView
from tests.support.images import PAGE, signed, write_layer
from tests.support.layers import SIZE, poke, read, written
from tests.support.live import until


def test_a_short_answer_without_waiting_is_a_miss_and_not_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Linux 5.9 and 5.10: preadv2 with RWF_NOWAIT may answer 0 before the end of the file.
    layer = Layer.open(str(written(tmp_path)))
    preadv = os.preadv

    def forgetful(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        return 0 if flags else preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", forgetful)
    with pytest.raises(BlockingIOError):
        layer.read_into(memoryview(bytearray(PAGE)), 2 * PAGE, nowait=True)
    assert read(layer) == signed(1, 2 * PAGE, PAGE)


def test_the_sync_comes_before_the_fingerprint_and_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    order: list[str] = []
    fsync, walk = os.fsync, sparse.data_extents

    def synced(fd: int) -> None:
        order.append("fsync")
        fsync(fd)
        # A chmod before the walk is part of what was walked; one after it is not.
        path.chmod(0o600)

    def walked(fd: int, size: int) -> object:
        order.append("walk")
        return walk(fd, size)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(sparse, "data_extents", walked)
    layer = Layer.open(str(path))
    assert order == ["fsync", "walk"]
    assert layer.is_unchanged()


def test_a_store_during_the_walk_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    os.utime(path, ns=(10**9, 10**9))
    walk = sparse.data_extents

    def storing(fd: int, size: int) -> object:
        extents = list(walk(fd, size))
        poke(path, 0, b"new")
        return iter(extents)

    monkeypatch.setattr(sparse, "data_extents", storing)
    layer = Layer.open(str(path))
    with pytest.raises(LayerChangedError, match="mtime"):
        read(layer)


def test_a_file_that_grew_while_it_was_opened_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: os.truncate(path, SIZE + PAGE))
    layer = Layer.open(str(path))
    with pytest.raises(LayerChangedError, match=f"size moved from {SIZE} to {SIZE + PAGE}"):
        read(layer)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EROFS])
def test_a_file_that_cannot_be_synced_because_it_cannot_be_written_is_opened(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    assert read(Layer.open(str(path))) == signed(1, 2 * PAGE, PAGE)


def test_a_sync_that_fails_refuses_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileAccessError) as caught:
        Layer.open(str(path))
    assert str(caught.value) == f"{path}: Input/output error"


def test_the_descriptor_is_closed_with_the_last_reference_and_by_close(tmp_path: Path) -> None:
    path = str(written(tmp_path))
    for close in (True, False):
        layer = Layer.open(path)
        fd = layer.fd
        assert os.readlink(f"/proc/self/fd/{fd}") == path
        if close:
            layer.close()
            layer.close()
        else:
            view = MergedView([layer])
            del layer
            gc.collect()
            os.fstat(fd)
            del view
            gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_closed_layer_does_not_read_the_next_file_of_its_descriptor(tmp_path: Path) -> None:
    view = MergedView([Layer.open(str(written(tmp_path)))])
    fd = view.layers[0].fd
    view.close()
    with (tmp_path / "other").open("w+b") as other:
        os.dup2(other.fileno(), fd)
    try:
        for read_view in (view.read, view.read_nowait):
            with pytest.raises(OSError, match="Bad file descriptor"):
                read_view(2 * PAGE, PAGE)
    finally:
        os.close(fd)


def test_a_refused_layer_leaves_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(SizeMismatchError, match="is empty"):
        Layer.open(str(path))
    gc.collect()
    assert os.listdir("/proc/self/fd") == before


def test_the_descriptor_is_read_only_and_not_inherited(tmp_path: Path) -> None:
    layer = Layer.open(str(written(tmp_path)))
    assert not os.get_inheritable(layer.fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(layer.fd, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(layer.fd, 0)


def test_a_missing_file_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "missing"
    with pytest.raises(FileAccessError) as caught:
        Layer.open(str(path))
    assert str(caught.value) == f"{path}: No such file or directory"


def test_the_key_survives_a_rename_and_a_chmod_and_not_a_store(tmp_path: Path) -> None:
    path = written(tmp_path)
    os.utime(path, ns=(10**9, 10**9))
    key = Layer.open(str(path)).key
    renamed = path.rename(tmp_path / "renamed")
    renamed.chmod(0o600)
    assert FileKey.of(renamed.stat()) == key
    poke(renamed, 0, b"x")
    assert FileKey.of(renamed.stat()) != key


def test_whether_a_range_is_zero_is_judged_by_every_byte(tmp_path: Path) -> None:
    extents = [(0, bytes(2 * PAGE)), (2 * PAGE, bytes(99) + b"\1")]
    layer = Layer.open(str(write_layer(tmp_path / "layer", SIZE, extents)))
    assert layer.is_zero(0, 2 * PAGE) and layer.is_zero(2 * PAGE, 2 * PAGE + 99)
    assert not layer.is_zero(0, 2 * PAGE + 100) and not layer.is_zero(2 * PAGE + 99, SIZE)
    assert layer.is_zero(2 * PAGE + 100, SIZE)
    os.truncate(tmp_path / "layer", SIZE - 1)
    with pytest.raises(LayerChangedError, match=f"ends before byte {SIZE}"):
        layer.is_zero(SIZE - PAGE, SIZE)


def test_a_refused_format_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"QFI\xfb" + bytes(PAGE))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ForeignFormatError):
        Layer.open(str(tmp_path / "disk"))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_process_may_go_on_with_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    os.utime(path, ns=(10**9 + 7, 10**9 + 7))
    layer = Layer.open(str(path))
    layer.records = (Record(".bmap", "seal", layer.key, PAGE, 3),)
    facts, extents = pickle.loads(pickle.dumps((layer.facts, layer.all_extents)))
    loads: list[str] = []

    def load() -> LayerExtents:
        loads.append("")
        return extents  # type: ignore[no-any-return]

    def fails(*_: object) -> None:
        raise AssertionError("nothing is synced or walked")

    fd = os.dup(layer.fd)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        patch.setattr(sparse, "walk", fails)
        again = Layer.restored(facts, fd, load)
        assert (again.path, again.fd, again.size) == (str(path), fd, SIZE)
        assert (again.key, again.status.st_mtime_ns) == (layer.key, 10**9 + 7)
        assert again.facts == layer.facts and again.record(".bmap") == layer.records[0]
        assert read(again) == signed(1, 2 * PAGE, PAGE) and again.is_unchanged()
        assert not loads, "its extents were not used yet"
        for name in LayerExtents._fields:
            assert list(getattr(again, name)) == list(getattr(layer, name))
        assert len(loads) == 1
    poke(path, 0, b"x")
    with pytest.raises(LayerChangedError):
        read(again)
    del again
    gc.collect()
    until(lambda: not os.path.exists(f"/proc/self/fd/{fd}"), "it is left open")


def test_a_restored_layer_that_was_found_changed_is_so_for_ever(tmp_path: Path) -> None:
    layer = Layer.open(str(written(tmp_path)))
    facts = layer.facts._replace(tainted="on purpose")
    again = Layer.restored(facts, os.dup(layer.fd), lambda: layer.all_extents)
    for ask in (again.is_unchanged, again.check_unchanged, lambda: read(again)):
        with pytest.raises(LayerChangedError, match="on purpose"):
            ask()


def test_a_restored_layer_whose_descriptor_is_none_is_an_error(tmp_path: Path) -> None:
    layer = Layer.open(str(written(tmp_path)))
    fd = os.dup(layer.fd)
    again = Layer.restored(layer.facts, fd, lambda: layer.all_extents)
    again.close()
    until(lambda: not os.path.exists(f"/proc/self/fd/{fd}"), "it is left open")
    with pytest.raises(OSError, match="Bad file descriptor"):
        again.is_unchanged()


def test_new_facts_are_told_before_anyone_learns_of_them(tmp_path: Path) -> None:
    path = written(tmp_path)
    layer = Layer.open(str(path))
    told: list[LayerFacts] = []
    layer.facts_changed = lambda of: told.append(of.facts)
    read(layer)
    assert not told
    path.chmod(0o600)  # moves the ctime, and no byte
    read(layer)
    (accepted,) = told
    assert accepted == layer.facts and accepted.fingerprint.ctime_ns == path.stat().st_ctime_ns
    poke(path, 2 * PAGE, b"x")
    for _ in range(2):
        with pytest.raises(LayerChangedError):
            read(layer)
        assert len(told) == 2 and told[1].tainted is not None
