"""What a mount refuses, when it finds out, and what it goes on showing beside it."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.live import error_of, until_equal
from tests.support.mounts import Mount, mounted
from tests.support.stores import SIZE, age, pages, write_chain, write_document, write_tag

REFUSED = "its memory file is not shown"


def open_layers(mount: Mount, store: Path) -> set[str]:
    """The files of the store that the daemon has open."""
    found = set()
    for link in Path(f"/proc/{mount.pid}/fd").iterdir():
        try:
            found.add(os.readlink(link))
        except FileNotFoundError:
            continue
    return {path for path in found if path.startswith(f"{store}/")}


def layers_of(store: Path) -> list[Path]:
    return sorted(store.rglob("memory.bin"))


def test_a_layer_is_opened_and_refused_only_when_its_tag_is_looked_into(
    public_path: Path, mountpoint: Path
) -> None:
    store = public_path / "store"
    write_tag(store, "base")
    # With 16 KiB guest pages, four pages that begin on one and three that do not.
    write_tag(store, "good", "base", numbers=range(4, 8))
    bad = write_tag(store, "bad", "good", numbers=range(9, 12))
    (bad / "other").mkdir()
    write_tag(store, "below", "bad", numbers=range(4))
    expected = overlay_oracle(SIZE, [pages(0, range(15)), pages(0, range(4, 8))])
    with (
        unchanged(layers_of(store)),
        mounted(store, mountpoint, "--page-size", "16384", expect_log=(REFUSED,)) as mount,
    ):
        assert sorted(os.listdir(mountpoint)) == ["bad", "base", "below", "good"]
        assert all(entry.stat().st_mode for entry in os.scandir(mountpoint))
        os.statvfs(mountpoint)
        assert (mountpoint / "bad").is_dir()
        assert open_layers(mount, store) == set()
        assert REFUSED not in mount.log()

        with ThreadPoolExecutor(8) as pool:
            errors = set(pool.map(error_of, [mountpoint / "bad" / "memory.bin"] * 16))
        assert errors == {errno.EIO}
        for _ in range(3):
            assert sorted(os.listdir(mountpoint / "bad")) == ["other", "snapshot.json", "vmstate"]
        assert not os.access(mountpoint / "bad" / "memory.bin", os.F_OK)
        assert (mountpoint / "bad" / "vmstate").read_bytes() == b"state of bad"
        assert error_of(mountpoint / "bad" / "other" / "x") == errno.ENOENT
        lines = [line for line in mount.log().splitlines() if REFUSED in line]
        assert len(lines) == 1 and "bad/memory.bin" in lines[0] and "16384" in lines[0]

        assert sorted(os.listdir(mountpoint / "below")) == ["snapshot.json", "vmstate"]
        assert error_of(mountpoint / "below" / "memory.bin") == errno.EIO
        assert mount.log().count(REFUSED) == 2
        assert (mountpoint / "good" / "memory.bin").read_bytes() == expected


def test_a_refused_layer_that_is_taken_again_is_shown(public_path: Path, mountpoint: Path) -> None:
    store = public_path / "store"
    write_tag(store, "base")
    folder = write_tag(store, "child", "base", numbers=[9])
    with mounted(store, mountpoint, "--page-size", "16384", expect_log=(REFUSED,)):
        view = mountpoint / "child" / "memory.bin"
        assert error_of(view) == errno.EIO
        write_layer(folder / "new.tmp", SIZE, pages(1, range(8, 12)))
        (folder / "new.tmp").rename(folder / "memory.bin")
        until_equal(lambda: error_of(view), None)
        layers = [pages(0, range(15)), pages(1, range(8, 12))]
        assert view.read_bytes() == overlay_oracle(SIZE, layers)
        assert "memory.bin" in os.listdir(mountpoint / "child")


def test_dense_links(public_path: Path, mountpoint: Path) -> None:
    store = public_path / "store"
    size = 500 * PAGE
    write_tag(store, "base", size=size, numbers=range(500))
    write_tag(store, "diff", "base", layer=1, size=size, numbers=[7])
    # Complete, in spite of its parent: many other bytes, and a few pages of zeros.
    merged = write_tag(store, "merged", "diff", layer=2, size=size, numbers=range(500))
    with (merged / "memory.bin").open("r+b") as file:
        file.write(signed(0, 0, 70 * PAGE))
        file.seek(100 * PAGE)
        file.write(bytes(50 * PAGE))
    # A diff of which a copy filled the holes.
    filled = write_tag(store, "filled", "base", layer=3, size=size, numbers=[7, 8])
    content = (filled / "memory.bin").read_bytes()
    (filled / "memory.bin").write_bytes(content)
    age(merged / "memory.bin", filled / "memory.bin")
    write_tag(store, "after", "merged", layer=4, size=size, numbers=[3])
    complete = (merged / "memory.bin").read_bytes()
    above = signed(4, 3 * PAGE, PAGE)
    with (
        unchanged(layers_of(store)),
        mounted(store, mountpoint, expect_log=(REFUSED,)) as mount,
    ):
        assert (mountpoint / "merged" / "memory.bin").read_bytes() == complete
        after = complete[: 3 * PAGE] + above + complete[4 * PAGE :]
        assert (mountpoint / "after" / "memory.bin").read_bytes() == after
        assert error_of(mountpoint / "filled" / "memory.bin") == errno.EIO
        assert "memory.bin" not in os.listdir(mountpoint / "filled")
        assert "looks like a diff whose holes were filled" in mount.log()
    with mounted(store, mountpoint, "--dense"):
        assert (mountpoint / "filled" / "memory.bin").read_bytes() == content


def test_renaming_is_no_change(public_path: Path, mountpoint: Path) -> None:
    store = write_chain(public_path / "store", ["base", "one", "two"])
    layers = [pages(0, range(15)), pages(1, [1]), pages(2, [2])]
    expected = overlay_oracle(SIZE, layers)
    # A look while the document is being written finds the tag broken.
    with mounted(store, mountpoint, expect_log=("not shown: ",)):
        old, new = mountpoint / "two" / "memory.bin", mountpoint / "renamed" / "memory.bin"
        with old.open("rb") as vm:
            assert vm.read(PAGE) == expected[:PAGE]
            # A tag under another name, its layer still in use under the old one.
            (store / "two").rename(store / "renamed")
            until_equal(lambda: error_of(new), None)
            until_equal(lambda: error_of(old), errno.ENOENT)
            assert new.read_bytes() == expected
            # Its memory file too, which is never seen as it is stored.
            os.link(store / "renamed" / "memory.bin", store / "renamed" / "a link")
            assert "a link" not in os.listdir(new.parent)
            assert error_of(new.parent / "a link") == errno.ENOENT
            (store / "renamed" / "memory.bin").rename(store / "renamed" / "m2.bin")
            # Or, after a look in between, broken.
            assert error_of(new.parent / "m2.bin") == errno.ENOENT
            write_document(store, "renamed", '{"memory": "m2.bin", "parent_tag": "one"}')
            until_equal(lambda: error_of(new.parent / "m2.bin"), None)
            # The device state is there again once two looks have seen it with this memory.
            names = ["m2.bin", "snapshot.json", "vmstate"]
            until_equal(lambda: sorted(os.listdir(new.parent)), names)
            assert (new.parent / "m2.bin").read_bytes() == expected
            # And the whole store.
            store.rename(public_path / "moved")
            for _ in range(12):
                assert (new.parent / "m2.bin").read_bytes() == expected
                assert sorted(os.listdir(mountpoint)) == ["base", "one", "renamed"]
                time.sleep(0.1)
            assert vm.read() == expected[PAGE:]
