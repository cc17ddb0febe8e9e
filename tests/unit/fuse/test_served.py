"""A served store: it opens images on demand, and each look takes up the changes."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.core.errors import DiffMergeError, FileAccessError, LayerChangedError
from diffmergefs.core.layer import Layer
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.fuse.served import Store, wait_until_stable
from diffmergefs.fuse.tags import Keys
from diffmergefs.opening import pins
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import read_catalog
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.live import until
from tests.support.logged import warnings
from tests.support.stores import (
    BASE_PAGES,
    OLD_NS,
    SECOND_NS,
    SIZE,
    age,
    opened_beneath,
    pages,
    write_chain,
    write_document,
    write_tag,
)
from tests.support.subjects.served import looked, root

__all__ = ["root"]


def where(store: Store) -> str:
    """The path of the directory that is served."""
    return os.readlink(f"/proc/self/fd/{store.fd}")


def replace_memory(folder: Path, layer: int) -> None:
    new = write_layer(folder / "new", SIZE, pages(layer, BASE_PAGES))
    age(new)
    new.rename(folder / "memory.bin")


def pinned(root: Path, tag: str, parent: str) -> None:
    """A diff that records the hash of its parent's present file."""
    recorded = hashlib.sha256((root / parent / "memory.bin").read_bytes()).hexdigest()
    write_tag(root, tag, parent, layer=1, parent_content_hash=recorded)


def until_tags(store: Store, *tags: str) -> None:
    def shows() -> bool:
        store.look()
        return set(store.tags()) == set(tags)

    until(shows, f"{tags} are not what is shown")


@pytest.fixture(autouse=True)
def log_seen_by_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    # A test that ran the command line in this process turned it off.
    monkeypatch.setattr(logging.getLogger("diffmergefs"), "propagate", True)


def test_nothing_is_opened_before_open(root: Path) -> None:
    before = opened_beneath(root)
    store = looked(root)
    assert set(store.tags()) == {"base", "work", "leaf"}
    assert store.opened("leaf") is None
    assert store.total_bytes() == 3 * SIZE
    assert opened_beneath(root) == before
    store.open("leaf")
    memories = {str(root / tag / "memory.bin") for tag in store.tags()}
    assert opened_beneath(root) - before == memories


def test_a_dropped_store_holds_no_descriptor(root: Path) -> None:
    fd = looked(root).fd
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_closed_store_closes_its_directory_once_and_no_image(root: Path) -> None:
    store = looked(root)
    shown = store.open("leaf")
    fd = store.fd
    with open(os.devnull) as other:
        store.close()
        os.dup2(other.fileno(), fd)  # another file has this number now
        store.close()
        os.close(fd)
    image = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2])])
    assert shown.view.read(0, SIZE) == image


def test_an_opened_image_is_the_chain_merged(root: Path) -> None:
    store = looked(root)
    shown = store.open("leaf")
    expected = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2])])
    assert shown.view.read(0, SIZE) == expected
    assert (shown.name, shown.visible, shown.mtime_ns) == ("memory.bin", 15 * PAGE, OLD_NS)
    assert store.opened("leaf") is shown
    assert store.open("leaf") is shown


def test_layers_that_chains_share_are_opened_once(root: Path) -> None:
    store = looked(root)
    leaf, work = store.open("leaf").view, store.open("work").view
    assert leaf.layers[:2] == work.layers


def test_threads_that_open_one_tag_at_once_get_one_image(root: Path) -> None:
    store = looked(root)
    barrier = threading.Barrier(8)
    found: list[object] = []

    def open_it() -> None:
        barrier.wait()
        found.append(store.open("leaf"))

    threads = [threading.Thread(target=open_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert store.opened("leaf") is found[0]


def test_a_tag_that_is_not_served_cannot_be_opened(root: Path) -> None:
    store = looked(root)
    with pytest.raises(FileAccessError, match="nobody"):
        store.open("nobody")
    assert store.opened("nobody") is None
    assert store.chain("nobody") is None


def test_a_layer_replaced_since_the_look_fails_and_the_next_look_helps(root: Path) -> None:
    store = looked(root)
    replace_memory(root / "base", 9)
    with pytest.raises(LayerChangedError, match=r"base/memory\.bin"):
        store.open("base")
    store.look()
    assert store.open("base").view.read(0, PAGE) == signed(9, 0, PAGE)


def test_a_look_forgets_an_image_whose_chain_changed(root: Path) -> None:
    store = looked(root)
    old = store.open("base")
    replace_memory(root / "base", 9)
    store.look()
    assert store.opened("base") is None
    new = store.open("base")
    assert new is not old
    assert old.view.read(0, PAGE) == signed(0, 0, PAGE)
    assert new.view.read(0, PAGE) == signed(9, 0, PAGE)


def test_a_look_forgets_an_image_with_a_tainted_layer(root: Path) -> None:
    store = looked(root)
    old = store.open("leaf")
    memory = root / "work" / "memory.bin"
    with memory.open("r+b") as file:
        file.write(signed(7, 0, PAGE))
    with pytest.raises(LayerChangedError):
        old.view.read(0, SIZE)
    age(memory)
    store.look()
    assert store.opened("leaf") is None
    new = store.open("leaf")
    assert new.view.read(0, PAGE) == signed(7, 0, PAGE)
    assert new.view.layers[0] is old.view.layers[0]


def test_without_a_change_a_look_keeps_the_image(root: Path) -> None:
    store = looked(root)
    shown = store.open("leaf")
    store.look()
    assert store.opened("leaf") is shown


def test_changed_access_is_another_image_with_the_same_view(public_path: Path) -> None:
    root = write_chain(public_path / "store", ["base", "work", "leaf"])
    store = looked(root)
    old = store.open("leaf")
    (root / "base" / "memory.bin").chmod(0o600)
    store.look()
    new = store.opened("leaf")
    assert new is not None and new is not old
    assert new.view is old.view
    assert (old.access.mode, new.access.mode) == (0o444, 0o400)


def test_a_layer_that_was_renamed_while_open_is_served_under_its_new_name(root: Path) -> None:
    store = looked(root)
    held = store.open("base")
    (root / "base").rename(root / "base2")
    write_document(root, "base2", '{"memory": "memory.bin"}')
    store.look()
    shown = store.open("base2")
    assert shown.view.layers == held.view.layers
    (root / "base2" / "memory.bin").rename(root / "base2" / "other.mem")
    write_document(root, "base2", '{"memory": "other.mem"}')
    store.look()
    renamed = store.opened("base2")
    assert renamed is not None
    assert (renamed.name, renamed.view) == ("other.mem", shown.view)


def test_a_failed_look_keeps_the_served_images_and_the_next_recovers(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = looked(root)
    opened = store.open("leaf")

    def fail(*_: object, **__: object) -> None:
        raise FileAccessError("gone")

    with monkeypatch.context() as patch:
        patch.setattr("diffmergefs.fuse.served.read_catalog", fail)
        with pytest.raises(FileAccessError):
            store.look()
    assert set(store.tags()) == {"base", "work", "leaf"}
    assert store.opened("leaf") is opened
    replace_memory(root / "work", 7)  # since the last successful look
    with pytest.raises(DiffMergeError):
        store.open("work")
    store.look()
    assert store.open("work").view.read(0, PAGE) == signed(7, 0, PAGE)


def test_a_broken_tag_is_logged_once_with_the_reason(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tag(root, "orphan", "nobody")
    store = looked(root)
    store.look()
    assert warnings(caplog) == ["orphan: not shown: parent 'nobody' of 'orphan' is missing"]
    caplog.clear()
    (root / "orphan").rename(root.parent / "away")
    store.look()
    assert [r.getMessage() for r in caplog.records] == ["orphan: gone"]


def test_the_hash_of_a_replaced_parent_does_not_count_if_it_changes_meanwhile(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = root / "base" / "memory.bin"
    recorded = hashlib.sha256(base.read_bytes()).hexdigest()
    write_tag(root, "work", "base", layer=1, parent_content_hash=recorded)
    store = looked(root)
    replace_memory(root / "base", 0)
    real = pins.content_hash

    def touch_and_hash(*arguments: Any) -> str:
        age(base, mtime_ns=OLD_NS + 1)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pins, "content_hash", touch_and_hash)
        store.look()
        until(lambda: len(warnings(caplog)) == 2, "it was not hashed")
    assert "base/memory.bin: its hash cannot be found: " in warnings(caplog)[-1]
    assert store.tags() == ["base"]
    until_tags(store, "base", "work", "leaf")


def test_look_returns_the_tags_that_must_settle(root: Path) -> None:
    store = Store(str(root), TrustPolicy(), clock=lambda: OLD_NS + SECOND_NS)
    assert store.look() == {"base", "work", "leaf"}
    assert store.tags() == []
    assert store.look() == set()
    assert set(store.tags()) == {"base", "work", "leaf"}


@pytest.mark.parametrize("make", [Path.touch, lambda path: None])
def test_a_root_that_is_no_directory_is_refused(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "it")
    with pytest.raises(FileAccessError, match=str(tmp_path / "it")):
        Store(str(tmp_path / "it"), TrustPolicy())


def test_a_look_does_not_wait_for_a_hash(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned(root, "work", "base")
    store = looked(root)
    replace_memory(root / "base", 0)
    go_on, real = threading.Event(), pins.content_hash
    hashed: list[str] = []

    def slow(layer: Layer, *arguments: Any) -> str:
        assert go_on.wait(60)
        hashed.append(layer.path)
        return real(layer, *arguments)

    monkeypatch.setattr(pins, "content_hash", slow)
    try:
        for _ in range(3):
            assert store.look() == {"work", "leaf"}
            assert store.tags() == ["base"]
    finally:
        go_on.set()
    until_tags(store, "base", "work", "leaf")
    assert len(hashed) == 1


def test_a_parent_that_cannot_be_hashed_does_not_delay_others(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for tag in ("one", "two"):
        write_tag(root, f"{tag}-base", layer=5, numbers=BASE_PAGES)
        pinned(root, tag, f"{tag}-base")
    # The parent that each look asks for first fails.
    bad, good = (tag for tag in read_catalog(str(root)).snapshots if tag in ("one", "two"))
    store = looked(root)
    for tag in (bad, good):
        replace_memory(root / f"{tag}-base", 5)
    always = {"base", "work", "leaf", "one-base", "two-base"}
    real = pins.content_hash

    def fails_for_one(layer: Layer, *arguments: Any) -> str:
        if layer.path.startswith(f"{bad}-base/"):
            time.sleep(0.05)  # so that it is not done when the look asks for the other
            raise OSError(5, "Input/output error")
        return real(layer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pins, "content_hash", fails_for_one)
        until_tags(store, *always, good)
        for _ in range(3):
            store.look()
            until(lambda: not store._replacements._waiting, "it was not tried again")
        assert warnings(caplog) == [
            f"{bad}-base/memory.bin: its hash cannot be found: [Errno 5] Input/output error"
        ]
    until_tags(store, *always, good, bad)


def test_the_same_complaint_is_logged_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = looked(root)
    replace_memory(root / "base", 9)
    for _ in range(3):
        with pytest.raises(LayerChangedError):
            store.open("base")
    assert len(warnings(caplog)) == 1
    assert warnings(caplog)[0].startswith("base: cannot be opened now: base/memory.bin: changed")


def test_everything_about_tags_that_are_gone_is_dropped(root: Path) -> None:
    write_tag(root, "other", layer=5, numbers=BASE_PAGES)
    filled = write_tag(root, "filled", "other", layer=7) / "memory.bin"
    filled.write_bytes(filled.read_bytes())
    age(filled)
    pinned(root, "work", "base")
    store = looked(root)
    replace_memory(root / "base", 0)
    until(lambda: not store.look() and store._replacements._known, "the new base was not hashed")
    with pytest.raises(DiffMergeError):
        store.open("filled")
    replace_memory(root / "leaf", 2)
    with pytest.raises(LayerChangedError):
        store.open("leaf")
    states = store.seen.tags
    assert states["filled"].refusal and states["leaf"].complaint and store._replacements._known
    for tag in ("filled", "other", "leaf", "work", "base"):
        shutil.rmtree(root / tag)
    store.look()
    assert not store.seen.tags
    queue = store._replacements
    assert not queue._known and not queue._waiting and not queue._failures


def test_a_directory_that_is_deleted_and_made_anew_is_followed(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = looked(root)
    old = store.open("leaf")
    shutil.rmtree(root)
    with pytest.raises(FileAccessError) as caught:
        store.look()
    assert str(caught.value) == f"{root}: was deleted; it is served again once it is back"
    assert store.tags() == []
    write_tag(root, "leaf", layer=7, numbers=BASE_PAGES)
    store.look()
    assert store.tags() == ["leaf"]
    assert store.open("leaf").view.read(0, PAGE) == signed(7, 0, PAGE)
    assert old.view.read(PAGE, PAGE) == signed(1, PAGE, PAGE)
    assert where(store) == str(root)
    moved = f"{root}: another directory is at this path now, and is served instead"
    assert [text for text in warnings(caplog) if "another directory" in text] == [moved]


def test_a_renamed_directory_is_followed_until_another_is_at_its_path(root: Path) -> None:
    store = looked(root)
    moved = root.rename(root.with_name("moved"))
    write_tag(moved, "later")
    store.look()
    assert set(store.tags()) == {"base", "work", "leaf", "later"}
    assert where(store) == str(moved)
    root.write_text("no directory")
    store.look()
    assert "later" in store.tags()
    root.unlink()
    write_chain(root, ["new"])
    store.look()
    assert store.tags() == ["new"]
    assert os.get_inheritable(store.fd) is False


def test_a_link_that_leads_elsewhere_is_followed(root: Path) -> None:
    link = root.with_name("link")
    link.symlink_to(root)
    store = looked(link)
    write_chain(root.with_name("other"), ["new"])
    root.with_name("next").symlink_to("other")
    root.with_name("next").rename(link)
    store.look()
    assert store.tags() == ["new"]


# Handed from one process to the next


def test_each_image_is_kept_before_it_is_served(root: Path) -> None:
    store = looked(root)
    kept: list[tuple[OpenImage, Keys]] = []

    def keep(image: OpenImage, keys: Keys) -> None:
        assert store.opened(image.tag) is not image
        kept.append((image, keys))

    store.keep = keep
    image = store.open("leaf")
    assert store.open("leaf") is image
    assert kept == [(image, store.seen.tags["leaf"].keys)]
    (root / "leaf" / "memory.bin").chmod(0o000)
    store.look()
    renewed = store.opened("leaf")
    assert renewed is not None and renewed is not image
    assert kept[1:] == [(renewed, store.seen.tags["leaf"].keys)]


def test_an_image_is_adopted_if_its_chain_is_the_same(root: Path) -> None:
    before, after = looked(root), looked(root)
    image = before.open("leaf")
    keys = pickle.loads(pickle.dumps(before.seen.tags["leaf"].keys))
    after.adopt("gone", keys, image)
    after.adopt("work", keys, image)
    assert after.opened("work") is None
    after.adopt("leaf", keys, image)
    assert after.opened("leaf") is image and after.open("leaf") is image
    replace_memory(root / "leaf", 9)
    after.look()
    assert after.opened("leaf") is None


def test_a_look_that_saw_news_is_saved_before_anything_is_served_by_it(root: Path) -> None:
    store = looked(root)
    saved: list[bytes] = []

    def save(memory: object) -> None:
        assert "new" not in store.tags()
        saved.append(pickle.dumps(memory))

    store.saved = save
    store.look()
    assert len(saved) == 1, "the first one is news"
    store.open("leaf")
    for _ in range(3):
        store.look()
    assert len(saved) == 1
    write_tag(root, "new", "base", layer=3)
    store.look()
    assert len(saved) == 2 and "new" in store.tags()


def test_a_successor_goes_on_from_what_was_saved(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = looked(root), looked(root)
    saved: list[bytes] = []
    before.saved = lambda memory: saved.append(pickle.dumps(memory))
    before.open("leaf")
    write_tag(root, "new", "base", layer=3)
    shutil.rmtree(root / "leaf")
    for _ in range(2):  # what was there once may come back
        before.look()
    after.remember(pickle.loads(saved[-1]))
    assert set(after.tags()) == {"base", "work", "new"}
    assert after.opened("new") is None and after.open("new").tag == "new"
    after.saved = lambda memory: saved.append(b"")
    caplog.clear()
    after.look()
    assert len(saved) == 2 and not caplog.records, "it saw nothing new"
    replace_memory(root / "base", 9)
    after.look()
    assert after.tags() == ["base"], "it knows which base the others were first seen with"


def test_another_directory_at_the_root_is_told(root: Path) -> None:
    store = looked(root)
    moved: list[str] = []
    store.moved = lambda fd: moved.append(os.readlink(f"/proc/self/fd/{fd}"))
    store.look()
    root.rename(root.with_name("old"))
    write_tag(root, "other")
    store.look()
    assert moved == [str(root)] and store.tags() == ["other"]


def test_what_is_fresh_is_looked_at_twice_before_it_is_shown(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = looked(root)
    monkeypatch.setattr("diffmergefs.fuse.served.LOOK_SECONDS", 0.001)
    looks: list[set[str]] = [{"leaf"}, set(), set()]
    monkeypatch.setattr(store, "look", lambda: looks.pop(0))
    wait_until_stable(store)
    assert len(looks) == 1
    wait_until_stable(store)
    assert looks == []
