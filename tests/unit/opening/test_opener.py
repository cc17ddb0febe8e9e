"""Open layers: each file once, shared by views and threads, within the limit of descriptors."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.core.errors import (
    DenseDiffError,
    FileAccessError,
    LayerChangedError,
    SizeMismatchError,
)
from diffmergefs.core.identity import FileKey
from diffmergefs.core.layer import Layer
from diffmergefs.opening.images import open_image, open_snapshot
from diffmergefs.opening.opener import LayerPool, require_spare_descriptors
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import read_catalog
from diffmergefs.stores.snapshot import StoredFile
from tests.support.descriptors import opened_below
from tests.support.images import PAGE, overlay_oracle, write_layer
from tests.support.stores import (
    BASE_PAGES,
    SIZE,
    pages,
    write_chain,
    write_tag,
)

CHAIN_ORACLE = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2])])


def stored(root: Path, *names: str) -> list[StoredFile]:
    return [StoredFile(name, FileKey.of((root / name).stat())) for name in names]


@pytest.fixture
def root_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


def in_threads(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    answers: list[Any] = [None] * len(calls)

    def run(n: int) -> None:
        answers[n] = calls[n]()

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_many_threads_open_a_layer_once(
    tmp_path: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layer(tmp_path / "a", SIZE, [])
    (file,) = stored(tmp_path, "a")
    syncs: list[int] = []

    def slow(fd: int) -> None:
        syncs.append(fd)
        time.sleep(0.05)

    monkeypatch.setattr(os, "fsync", slow)
    pool = LayerPool(root_fd, TrustPolicy())
    layers = in_threads([lambda: pool.layer(file)] * 8)
    assert isinstance(layers[0], Layer) and {id(layer) for layer in layers} == {id(layers[0])}
    assert len(syncs) == 1


def test_different_layers_are_opened_side_by_side(
    tmp_path: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        write_layer(tmp_path / name, SIZE, [])
    both = threading.Barrier(2, timeout=20)  # broken if one waits for the other's end
    monkeypatch.setattr(os, "fsync", lambda _: both.wait())
    pool = LayerPool(root_fd, TrustPolicy())
    files = stored(tmp_path, "a", "b")
    layers = in_threads([lambda: pool.layer(files[0]), lambda: pool.layer(files[1])])
    assert [layer.path for layer in layers] == ["a", "b"]


def test_two_names_of_one_file_are_one_layer(tmp_path: Path, root_fd: int) -> None:
    os.link(write_layer(tmp_path / "a", SIZE, []), tmp_path / "b")
    pool = LayerPool(root_fd, TrustPolicy())
    a, b = (pool.layer(file) for file in stored(tmp_path, "a", "b"))
    assert a is b


def test_views_of_one_directory_share_their_base(tmp_path: Path, root_fd: int) -> None:
    write_chain(tmp_path, ["base", "one"])
    write_tag(tmp_path, "other", "base", layer=3)
    catalog, pool = read_catalog(str(tmp_path)), LayerPool(root_fd, TrustPolicy())
    one, other = (
        open_snapshot(catalog.chain(t), pool, TrustPolicy()).view for t in ("one", "other")
    )
    assert one.layers[0] is other.layers[0]
    assert one.layers[1] is not other.layers[1]


def test_a_layer_that_no_view_uses_is_closed(tmp_path: Path, root_fd: int) -> None:
    write_layer(tmp_path / "a", SIZE, [])
    pool = LayerPool(root_fd, TrustPolicy())
    layer = pool.layer(*stored(tmp_path, "a"))
    assert opened_below(tmp_path) == {"a"}
    del layer
    assert opened_below(tmp_path) == set()


def test_a_tainted_layer_is_opened_anew(tmp_path: Path, root_fd: int) -> None:
    path = write_layer(tmp_path / "a", SIZE, pages(0, [0]))
    pool = LayerPool(root_fd, TrustPolicy())
    (file,) = stored(tmp_path, "a")
    old = pool.layer(file)
    os.utime(path, ns=(1, 1))
    with pytest.raises(LayerChangedError):
        old.check_unchanged()
    os.utime(path, ns=(1, file.key.mtime_ns))
    new = pool.layer(file)
    assert new is not old and not new.tainted
    assert pool.layer(file) is new


def test_another_content_at_the_path_than_was_looked_at_is_refused(
    tmp_path: Path, root_fd: int
) -> None:
    write_layer(tmp_path / "a", SIZE, [])
    (file,) = stored(tmp_path, "a")
    write_layer(tmp_path / "new", SIZE, []).rename(tmp_path / "a")
    with pytest.raises(LayerChangedError, match="a: changed since its directory was read"):
        LayerPool(root_fd, TrustPolicy()).layer(file)


def test_messages_name_layers_by_paths_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_chain(tmp_path / "store", ["base", "one"])
    write_tag(store, "other", "base", layer=2, size=SIZE + PAGE)
    write_tag(store, "filled", "base", layer=3, numbers=[3])
    filled = store / "filled" / "memory.bin"
    filled.write_bytes(filled.read_bytes())
    monkeypatch.chdir(tmp_path)
    layers = open_image("store/one").view.layers
    assert [layer.path for layer in layers] == [
        f"{store}/{tag}/memory.bin" for tag in ("base", "one")
    ]
    with pytest.raises(SizeMismatchError) as caught:
        open_image("store/other")
    assert str(caught.value).startswith(f"in {store}: other/memory.bin: {SIZE + PAGE} bytes")
    with pytest.raises(DenseDiffError) as refused:
        open_image("store/filled")
    assert str(refused.value).startswith(f"{filled}: looks like")


def test_a_layer_takes_none_of_the_last_descriptors(
    tmp_path: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layer(tmp_path / "a", SIZE, [])
    (file,) = stored(tmp_path, "a")
    pool = LayerPool(root_fd, TrustPolicy(), "/where")
    with monkeypatch.context() as patch:
        patch.setattr(resource, "getrlimit", lambda _: (8, 8))
        with pytest.raises(FileAccessError) as caught:
            pool.layer(file)
    assert str(caught.value) == "/where/a: Too many open files"
    del caught
    assert opened_below(tmp_path) == set()
    assert pool.layer(file).path == "/where/a"


@pytest.mark.parametrize(
    ("soft", "last"), [(64, 47), (512, 383), (1024, 895), (1 << 20, (1 << 20) - 129)]
)
def test_how_many_descriptors_are_kept_back(
    soft: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    require_spare_descriptors(last, "x")
    with pytest.raises(OSError) as caught:
        require_spare_descriptors(last + 1, "x")
    assert (caught.value.errno, caught.value.filename) == (errno.EMFILE, "x")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    require_spare_descriptors(10**9, "x")
