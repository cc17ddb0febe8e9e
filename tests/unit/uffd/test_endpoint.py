"""A directory with a socket for each snapshot: which are there, and what they lead to."""

from __future__ import annotations

import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from diffmergefs.core.errors import FileAccessError, OutputRefusedError
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.served import Store
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.uffd.endpoint import News, SocketDirectory
from diffmergefs.uffd.vm import Plan
from tests.support.images import PAGE, write_layer
from tests.support.live import until
from tests.support.logged import warnings
from tests.support.stores import OLD_NS, SECOND_NS, SIZE, age, pages, write_chain, write_tag

Make = Callable[[], SocketDirectory]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_chain(tmp_path / "store", ["base", "leaf"])


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    found = Store(str(root), TrustPolicy(), clock=lambda: OLD_NS + 100 * SECOND_NS)
    found.look()
    yield found
    found.close()


def plan_of(view: MergedView) -> Plan:
    return Plan(view, PAGE, kills=False, ahead=list)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "sockets"
    path.mkdir()
    return path


@pytest.fixture
def sockets(store: Store, place: Path) -> Iterator[SocketDirectory]:
    found = SocketDirectory(store, str(place), None, plan_of)
    yield found
    found.close()


def close(news: News) -> None:
    for endpoint in (*news.added, *news.gone):
        endpoint.listener.socket.close()


def names(place: Path) -> list[str]:
    return sorted(
        str(path.relative_to(place))
        for path in place.rglob("*")
        if stat.S_ISSOCK(path.lstat().st_mode)
    )


def test_each_tag_has_a_socket_as_long_as_it_is_served(
    root: Path, store: Store, place: Path, sockets: SocketDirectory
) -> None:
    first = sockets.update()
    assert [each.image for each in first.added] == ["base", "leaf"] and first.gone == []
    assert names(place) == ["base.sock", "leaf.sock"]
    assert stat.S_IMODE((place / "leaf.sock").stat().st_mode) == 0o600
    assert sockets.update() == ([], [])
    write_tag(root, "new", "base", layer=3, numbers=[3])
    shutil.rmtree(root / "leaf")
    store.look()
    news = sockets.update()
    assert [each.image for each in news.added] == ["new"]
    assert [each.image for each in news.gone] == ["leaf"]
    assert names(place) == ["base.sock", "new.sock"]
    sockets.close()
    assert names(place) == [] and sockets.update() == ([], [])
    for found in (first, news):
        close(found)


def test_it_leads_to_the_image_that_the_tag_has_then(
    root: Path, store: Store, sockets: SocketDirectory
) -> None:
    news = sockets.update()
    (leaf,) = [each for each in news.added if each.image == "leaf"]
    plan = leaf.plan()
    assert leaf.plan() is plan
    old = plan.view.read(5 * PAGE, PAGE)
    new = write_layer(root / "leaf" / "new", SIZE, pages(9, [5]))
    age(new)
    new.rename(root / "leaf" / "memory.bin")
    store.look()
    other = leaf.plan()
    assert other is not plan and other.view.read(5 * PAGE, PAGE) != old
    assert plan.view.read(5 * PAGE, PAGE) == old
    shutil.rmtree(root / "leaf")
    store.look()
    with pytest.raises(FileAccessError, match="leaf: no such snapshot is served"):
        leaf.plan()
    close(news)


class Tags:
    """Stands for a store that serves these tags."""

    def __init__(self, root: Path, *tags: str) -> None:
        self.root, self.shown = str(root), list(tags)

    def tags(self) -> list[str]:
        return self.shown


def test_a_tag_with_slashes_has_directories_which_go_with_it(root: Path, place: Path) -> None:
    (place / "kept").mkdir()
    (place / "in" / "the").mkdir(parents=True)
    (place / "in" / "the" / "way.sock").touch()
    store = Tags(root, "a/b/c", "a/d", "kept/e", "in/the/way", "in/the/way.sock/f")
    sockets = SocketDirectory(cast(Store, store), str(place), None, plan_of)
    news = [sockets.update()]
    assert names(place) == ["a/b/c.sock", "a/d.sock", "kept/e.sock"]
    store.shown = ["a/d"]
    news.append(sockets.update())
    assert not (place / "a" / "b").exists() and (place / "kept").exists()
    sockets.close()
    assert sorted(path.name for path in place.iterdir()) == ["in", "kept"]
    for each in news:
        close(each)


def test_no_socket_is_made_in_the_store(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor where a symlink in the directory leads there."""
    (tmp_path / "link").symlink_to(root)
    store = Tags(root, f"{root.name}/base/x", "link/base/y", "z")
    sockets = SocketDirectory(cast(Store, store), str(tmp_path), None, plan_of)
    before = sorted(root.rglob("*"))
    news = sockets.update()
    assert [each.image for each in news.added] == ["z"]
    assert sorted(root.rglob("*")) == before
    assert all("where nothing may be made" in line for line in warnings(caplog))
    sockets.close()
    close(news)


def test_what_is_in_the_way_is_left_and_named_once(
    store: Store, place: Path, sockets: SocketDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    (place / "leaf.sock").write_text("mine")
    news = [sockets.update() for _ in range(3)]
    assert [each.image for found in news for each in found.added] == ["base"]
    assert (place / "leaf.sock").read_text() == "mine"
    (line,) = warnings(caplog)
    assert line.startswith(f"leaf: has no socket: {place}/leaf.sock: exists and is no socket;")
    (place / "leaf.sock").unlink()
    news.append(sockets.update())
    assert [each.image for each in news[-1].added] == ["leaf"]
    for found in news:
        close(found)


def test_the_sockets_of_a_dead_server_are_replaced(place: Path, sockets: SocketDirectory) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place / "leaf.sock"))
    news = sockets.update()
    assert [each.image for each in news.added] == ["base", "leaf"]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(place / "leaf.sock"))
    close(news)


def test_it_must_be_a_directory_outside_the_store(store: Store, root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root / "base")
    for path in (root, root / "base", tmp_path / "link"):
        with pytest.raises(OutputRefusedError, match=f"lies in {root}"):
            SocketDirectory(store, str(path), None, plan_of)
    with pytest.raises(FileAccessError, match="No such file or directory"):
        SocketDirectory(store, str(tmp_path / "none" / "new"), None, plan_of)
    SocketDirectory(store, str(tmp_path / "new"), None, plan_of)
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(FileAccessError, match="Not a directory"):
        SocketDirectory(store, str(tmp_path / "file"), None, plan_of)


def test_a_watch_tells_what_is_new_and_outlives_failures(
    root: Path, store: Store, sockets: SocketDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[News] = []
    watch = threading.Thread(target=sockets.watch, args=(0.01, told.append))
    watch.start()
    try:
        until(lambda: told, "it tells nothing")
        root.rename(root.with_name("away"))
        write_tag(root.with_name("away"), "new", "base", layer=3, numbers=[3])
        until(lambda: len(told) == 2, "it does not tell of the new tag")
        shutil.rmtree(root.with_name("away"))
        until(lambda: warnings(caplog), "it does not tell of the failure")
    finally:
        sockets.close()
        watch.join(30)
    assert not watch.is_alive()
    assert [each.image for found in told for each in found.added] == ["base", "leaf", "new"]
    for found in told:
        close(found)
