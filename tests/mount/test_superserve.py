"""A mount of Superserve's snapshots."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.images import overlay_oracle, write_layer
from tests.support.live import until
from tests.support.mounts import mounted
from tests.support.stores import SIZE, age, pages
from tests.support.subjects.superserve import BASE, TAGS, image, store
from tests.support.superserve import presence, write_sandbox

__all__ = ["store"]


def content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def test_a_mount_shows_complete_images_without_their_records(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint, "--layout=superserve"):
        assert sorted(os.listdir(mountpoint)) == TAGS
        assert (mountpoint / "vm-1" / "mem.diff").read_bytes() == image(1, [1, 5])
        assert (mountpoint / "vm-1+snap-2" / "mem.diff").read_bytes() == image(2, [5, 15])
        assert sorted(os.listdir(mountpoint / "vm-1")) == ["mem.diff", "snap-2", "vmstate.snap"]
        assert os.listdir(mountpoint / "vm-1" / "snap-2") == ["vmstate.snap"]
        assert (mountpoint / "vm-1" / "vmstate.snap").read_bytes() == b"state of the sandbox"
        template = mountpoint / "templates+python" / "mem.snap"
        assert template.read_bytes() == overlay_oracle(SIZE, [BASE])


def test_what_changes_shows_under_a_live_mount(store: Path, mountpoint: Path) -> None:
    memory = mountpoint / "vm-1" / "mem.diff"
    # In between the diff may be seen with the presence of the other save.
    log = ("not shown: vm-1/mem.diff.presence: is empty", "vm-3: not shown", "of another save")
    with mounted(store, mountpoint, expect_log=log):
        assert memory.read_bytes() == image(1, [1, 5])
        before = memory.stat().st_ino
        write_sandbox(store, "vm-3", store / "templates/python/mem.snap", layer=3, numbers=[7])
        shown = mountpoint / "vm-3" / "mem.diff"
        until(lambda: content(shown) == image(3, [7]), "the new sandbox")
        # Another save of the sandbox: both files anew.
        diff = store / "vm-1" / "mem.diff"
        write_layer(store / "new", SIZE, pages(4, [2]))
        (store / "new.presence").write_bytes(presence([2]))
        age(store / "new", store / "new.presence")
        (store / "new").rename(diff)
        (store / "new.presence").rename(f"{diff}.presence")
        until(lambda: content(memory) == image(4, [2]), "the new save")
        assert memory.stat().st_ino != before
        Path(f"{diff}.presence").write_bytes(b"")
        age(Path(f"{diff}.presence"))
        until(lambda: not (mountpoint / "vm-1").exists(), "the torn save goes")


def test_a_copy_of_the_store_that_filled_all_holes_shows_the_same(
    store: Path, mountpoint: Path
) -> None:
    for diff in store.rglob("mem.diff"):
        diff.write_bytes(diff.read_bytes())
    with mounted(store, mountpoint):
        assert (mountpoint / "vm-1" / "mem.diff").read_bytes() == image(1, [1, 5])
