"""Law 6: what changes a layer stops its views, and what does not change it does not."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.errors import LayerChangedError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from tests.support.calls import first
from tests.support.images import PAGE, signed, write_layer
from tests.support.layers import DATA, SIZE, keep_times, poke, punch, read, written

# Each change is of a file whose mtime is long past, so that a coarse clock cannot hide it.
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda path: os.truncate(path, SIZE - PAGE),
        f"size moved from {SIZE} to {SIZE - PAGE}",
    ),
    "grown": (
        lambda path: os.truncate(path, SIZE + PAGE),
        f"size moved from {SIZE} to {SIZE + PAGE}",
    ),
    "overwritten": (lambda path: poke(path, 2 * PAGE, b"new"), "mtime moved from 1000000000 to"),
    "written in a hole": (lambda path: poke(path, 0, b"new"), "mtime moved from 1000000000 to"),
    "punched, mtime restored": (
        lambda path: keep_times(path, lambda: punch(path, 2 * PAGE, PAGE)),
        "data extents are gone",
    ),
    "an extent punched, mtime restored": (
        lambda path: keep_times(path, lambda: punch(path, 8 * PAGE, PAGE)),
        "data extents are gone",
    ),
    "new data, mtime restored": (
        lambda path: keep_times(path, lambda: poke(path, 5 * PAGE, bytes(100) + b"new")),
        f"{PAGE} bytes became data that are not zeros",
    ),
    "new data in the last byte, mtime restored": (
        lambda path: keep_times(path, lambda: poke(path, SIZE - 1, b"\1")),
        f"{PAGE} bytes became data that are not zeros",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_fails_for_good_with_one_warning(
    change: str, real_fs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    act, reason = CHANGES[change]
    path = written(real_fs)
    os.utime(path, ns=(10**9, 10**9))
    layer = Layer.open(str(path))
    assert read(layer) == signed(1, 2 * PAGE, PAGE)
    act(path)
    for _ in range(2):
        with pytest.raises(LayerChangedError) as caught:
            read(layer)
        assert str(path) in str(caught.value) and reason in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(LayerChangedError):
        layer.is_unchanged()
    with pytest.raises(LayerChangedError):
        MergedView([layer]).read_nowait(2 * PAGE, PAGE)
    (warning,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert str(path) in warning.getMessage() and reason in warning.getMessage()


def test_a_tainted_layer_stays_so_though_its_file_is_put_back(real_fs: Path) -> None:
    path = written(real_fs)
    os.utime(path, ns=(10**9, 10**9))
    layer = Layer.open(str(path))
    os.utime(path, ns=(2 * 10**9, 2 * 10**9))
    with pytest.raises(LayerChangedError):
        read(layer)
    os.utime(path, ns=(10**9, 10**9))
    with pytest.raises(LayerChangedError):
        read(layer)
    assert read(Layer.open(str(path))) == signed(1, 2 * PAGE, PAGE)


def link(path: Path) -> None:
    os.link(path, path.with_name("link"))


HARMLESS: dict[str, Callable[[Path], object]] = {
    "chmod": lambda path: path.chmod(0o400),
    "chown": lambda path: os.chown(path, 12345, 12345),
    "rename": lambda path: path.rename(path.with_name("renamed")),
    "link": link,
    "unlink": lambda path: path.unlink(),
    "xattr": lambda path: os.setxattr(path, "trusted.note", b"x"),
    "mtime set as it was": lambda path: os.utime(path, ns=(10**9, 10**9)),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_what_is_no_change_leaves_the_layer_right_with_one_quiet_line(
    change: str, real_fs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(real_fs)
    os.utime(path, ns=(10**9, 10**9))
    layer = Layer.open(str(path))
    HARMLESS[change](path)
    assert not layer.is_unchanged()
    for _ in range(2):
        assert read(layer) == signed(1, 2 * PAGE, PAGE)
        assert layer.is_unchanged()
    assert layer.extents == ExtentList(DATA)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert str(path) in record.getMessage() and "the same extents" in record.getMessage()


def test_a_replaced_file_does_not_reach_an_open_layer(real_fs: Path) -> None:
    path = written(real_fs)
    layer = Layer.open(str(path))
    write_layer(real_fs / "new", SIZE, [(2 * PAGE, b"new")]).rename(path)
    assert read(layer) == signed(1, 2 * PAGE, PAGE)


def test_writeback_of_a_dirty_file_is_no_change(
    real_fs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = real_fs / "layer"
    with path.open("wb", buffering=0) as file:
        file.truncate(SIZE)
        for start, stop in DATA:
            os.pwrite(file.fileno(), signed(1, start, stop - start), start)
        layer = Layer.open(str(path))
        os.fsync(file.fileno())
    subprocess.run(["sync", "-f", path], check=True)
    assert read(layer) == signed(1, 2 * PAGE, PAGE)
    assert layer.extents == ExtentList(DATA)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_preallocated_range_that_is_not_cached_any_more_is_no_change(
    kind: str, filesystem: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """It is data as long as its pages are cached, on these; a base may be full of such."""
    path = written(filesystem(kind))
    command = ["fallocate", "--keep-size", "-o", str(4 * PAGE), "-l", str(8 * PAGE), str(path)]
    subprocess.run(command, check=True)
    os.utime(path, ns=(10**9, 10**9))
    assert path.read_bytes()
    layer = Layer.open(str(path))
    cached = layer.extents
    assert list(layer.unwritten) == [(4 * PAGE, 8 * PAGE), (9 * PAGE, 12 * PAGE)]
    assert list(cached) == [(2 * PAGE, 12 * PAGE)]
    os.posix_fadvise(layer.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert list(sparse.data_extents(layer.fd, SIZE)) == DATA
    path.chmod(0o600)
    assert read(layer, 10 * PAGE) == bytes(PAGE)
    assert read(layer) == signed(1, 2 * PAGE, PAGE)
    assert layer.extents is cached
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    # All but the page that was read just now.
    assert f"{6 * PAGE} bytes that were never written are holes" in record.getMessage()
    # What was written beside it still may not go.
    keep_times(path, lambda: punch(path, 3 * PAGE, 2 * PAGE))
    with pytest.raises(LayerChangedError, match="data extents are gone"):
        read(layer)


_TOUCH = "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1);"


def test_a_reader_of_a_tmpfs_hole_changes_nothing(
    filesystem: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = written(filesystem("tmpfs"))
    layer = Layer.open(str(path))
    # Another process maps the file and touches a page of a hole.
    subprocess.run([sys.executable, "-c", f"{_TOUCH} m[{6 * PAGE}]", path], check=True)
    now = ExtentList(sparse.data_extents(layer.fd, SIZE))
    assert now == ExtentList([*DATA[:1], (6 * PAGE, 7 * PAGE), *DATA[1:]])
    assert read(layer) == signed(1, 2 * PAGE, PAGE)
    assert layer.extents == ExtentList(DATA)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert f"{PAGE} bytes of holes became written zeros" in record.getMessage()
    # Known now: what was said once is not said again.
    assert read(layer) == signed(1, 2 * PAGE, PAGE)
    assert len(caplog.records) == 1


def test_more_zeros_than_a_block_are_compared_and_one_byte_after_them_is_seen(
    real_fs: Path,
) -> None:
    size = 4 << 20
    path = write_layer(real_fs / "layer", size, [(0, signed(1, 0, PAGE))])
    layer = Layer.open(str(path))
    keep_times(path, lambda: poke(path, PAGE, bytes(3 << 20)))
    assert read(layer, 0) == signed(1, 0, PAGE)
    keep_times(path, lambda: poke(path, PAGE + (3 << 20), bytes(PAGE - 1) + b"\1"))
    with pytest.raises(LayerChangedError, match="not zeros"):
        read(layer, 0)


def test_a_view_fails_only_where_a_read_reaches_the_changed_layer(tmp_path: Path) -> None:
    base = Layer.open(str(write_layer(tmp_path / "base", SIZE, [(0, signed(0, 0, SIZE))])))
    diff = written(tmp_path)
    view = MergedView([base, Layer.open(str(diff))])
    poke(diff, 0, b"new")
    assert view.read(0, 2 * PAGE) == signed(0, 0, 2 * PAGE)
    with pytest.raises(LayerChangedError, match=str(diff)):
        view.read(PAGE, 2 * PAGE)
    with pytest.raises(LayerChangedError, match=str(diff)):
        view.check_unchanged()


def test_many_threads_check_one_moved_layer_with_one_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    layer = Layer.open(str(path))
    path.chmod(0o600)
    walks: list[int] = []
    walk = sparse.data_extents
    monkeypatch.setattr(sparse, "data_extents", first(lambda *_: walks.append(1), walk))
    failures: list[BaseException] = []

    def check() -> None:
        try:
            assert read(layer) == signed(1, 2 * PAGE, PAGE)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=check) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(walks) == 1


def test_a_layer_that_several_threads_find_changed_counts_once(real_fs: Path) -> None:
    both_look = threading.Barrier(2)

    class Watched(Layer):
        # Whoever looks whether it is known waits for another who looks too, if one can.
        _tainted: str | None = None

        @property
        def tainted(self) -> str | None:
            found = self._tainted
            if found is None and threading.current_thread().name == "finder":
                with suppress(threading.BrokenBarrierError):
                    both_look.wait(0.5)
            return found

        @tainted.setter
        def tainted(self, reason: str | None) -> None:
            self._tainted = reason

    path = written(real_fs)
    layer, before = Watched(str(path), os.open(path, os.O_RDONLY)), Layer.taints
    os.utime(path)

    def find() -> None:
        with pytest.raises(LayerChangedError):
            layer.is_unchanged()

    threads = [threading.Thread(target=find, name="finder") for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    layer.close()
    assert Layer.taints == before + 1
