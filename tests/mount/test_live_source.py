"""A live mount shows changes in SOURCE, but never half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffmergefs.fuse.replies import CHANGING_SECONDS
from diffmergefs.fuse.served import LOOK_SECONDS
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.live import error_of, until, until_equal
from tests.support.mounts import Mount, mounted
from tests.support.stores import (
    BASE_PAGES,
    SIZE,
    age,
    pages,
    write_chain,
    write_document,
    write_numbered,
    write_tag,
)

# Reads a file repeatedly until stdin ends. Prints each result that is neither "no such file"
# nor the right bytes, and how often it got the right bytes.
POLLER = """
import hashlib, os, select, sys
right, found = 0, set()
while not select.select([sys.stdin], [], [], 0.001)[0] or not right:
    try:
        with open(sys.argv[1], 'rb') as file:
            data = file.read()
    except FileNotFoundError:
        continue
    except OSError as error:
        found.add(str(error))
        continue
    if hashlib.sha256(data).hexdigest() == sys.argv[2]:
        right += 1
    else:
        found.add(f'{len(data)} other bytes')
print(sorted(found))
"""


@contextmanager
def polled(path: Path, image: bytes) -> Iterator[None]:
    """A process that reads the file all the time: it must get the right bytes or no file."""
    command = [sys.executable, "-c", POLLER, str(path), hashlib.sha256(image).hexdigest()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield
            output, _ = process.communicate(timeout=60)
            assert output == b"[]\n"
        finally:
            process.kill()


def image_of(*layers: tuple[int, range | list[int]]) -> bytes:
    return overlay_oracle(SIZE, [pages(layer, numbers) for layer, numbers in layers])


def replace_memory(folder: Path, layer: int, numbers: range | list[int]) -> None:
    new = write_layer(folder / "new.tmp", SIZE, pages(layer, numbers))
    new.rename(folder / "memory.bin")


def shows(mount: Path, *tags: str) -> bool:
    return sorted(os.listdir(mount)) == sorted(tags)


def until_shown(mount: Mount, *tags: str) -> None:
    until(lambda: shows(mount.path, *tags), f"{tags} are not what is shown")


def test_two_looks_and_the_kernels_memory_fit_into_two_seconds() -> None:
    assert 2 * LOOK_SECONDS + CHANGING_SECONDS < 2


def test_a_tag_appears_complete_and_disappears(public_path: Path, mountpoint: Path) -> None:
    store = write_chain(public_path / "store", ["base"])
    with mounted(store, mountpoint) as mount:
        image = image_of((0, BASE_PAGES), (3, [3]))
        with polled(mountpoint / "leaf" / "memory.bin", image):
            staged = write_tag(public_path / "staging", "leaf", "base", layer=3)
            write_document(
                public_path / "staging", "leaf", '{"memory": "memory.bin", "parent_tag": "base"}'
            )
            staged.rename(store / "leaf")
            until_shown(mount, "base", "leaf")
        (store / "leaf").rename(public_path / "away")
        until_shown(mount, "base")
        until(lambda: not (mountpoint / "leaf").exists(), "leaf is still there")


def test_a_tag_that_is_replaced_is_busy_and_then_shows_the_new_bytes(
    public_path: Path, mountpoint: Path
) -> None:
    """Nobody has opened it before. EIO would say that the storage fails."""
    store = write_chain(public_path / "store", ["base"])
    for number in range(5):
        write_tag(store, f"leaf{number}", "base", layer=1, numbers=[1])
    found = set()
    with mounted(store, mountpoint, expect_log=("cannot be opened now",)):
        for number in range(5):
            view = mountpoint / f"leaf{number}" / "memory.bin"
            replace_memory(store / f"leaf{number}", 9, [5])
            new = image_of((0, BASE_PAGES), (9, [5]))
            while (error := error_of(view)) is not None:
                found.add(error)
            assert view.read_bytes() == new
    assert errno.EBUSY in found and found <= {errno.EBUSY, errno.ENOENT}


def test_a_slowly_written_tag_appears_complete(public_path: Path, mountpoint: Path) -> None:
    """A copy writes first the document, then the diff, which grows to its size."""
    store = write_chain(public_path / "store", ["base"])
    numbers = [2, 5, 11, 15]
    with mounted(store, mountpoint, expect_log=("leaf: not shown: ",)) as mount:
        with polled(mountpoint / "leaf" / "memory.bin", image_of((0, BASE_PAGES), (7, numbers))):
            (store / "leaf").mkdir()
            (store / "leaf" / "snapshot.json").write_text('{"memory": ')
            until(lambda: "leaf: not shown: " in mount.log(), "the half document was not seen")
            (store / "leaf" / "snapshot.json").write_text(
                '{"memory": "memory.bin", "parent_tag": "base"}'
            )
            with (store / "leaf" / "memory.bin").open("wb", buffering=0) as file:
                for n, data in pages(7, numbers):
                    # Longer than two looks after the first part, so that looks see half of it.
                    file.seek(n)
                    file.write(data)
                    if n == numbers[0] * PAGE:
                        until(lambda: "bytes" in mount.log(), "half the diff was not looked at")
            until_shown(mount, "base", "leaf")
        assert "leaf: not shown: leaf/memory.bin: 12288 bytes, but" in mount.log()


def test_a_replaced_leaf_is_a_new_file_each_time(public_path: Path, mountpoint: Path) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    view = mountpoint / "leaf" / "memory.bin"
    with mounted(store, mountpoint):
        used = {view.stat().st_ino, (mountpoint / "base" / "memory.bin").stat().st_ino}
        handles = [view.open("rb", buffering=0)]
        try:
            for layer in (11, 12, 13):
                replace_memory(store / "leaf", layer, [layer])
                until(
                    lambda: view.exists() and view.stat().st_ino not in used, "nothing new is shown"
                )
                used.add(view.stat().st_ino)
                assert view.read_bytes() == image_of((0, BASE_PAGES), (layer, [layer]))
                handles.append(view.open("rb", buffering=0))
            assert len({os.fstat(handle.fileno()).st_ino for handle in handles}) == 4
            for layer, handle in zip((1, 11, 12, 13), handles, strict=True):
                assert handle.read() == image_of((0, BASE_PAGES), (layer, [layer]))
        finally:
            for handle in handles:
                handle.close()


def test_a_replaced_parent(public_path: Path, mountpoint: Path) -> None:
    """Its descendants vanish, except one that records the hash of the new file."""
    store = write_chain(public_path / "store", ["base", "work", "leaf"])
    new = image_of((21, BASE_PAGES))
    write_tag(store, "pinned", "base", layer=4, parent_content_hash=hashlib.sha256(new).hexdigest())
    expected = ("not shown: parent replaced: ", "not shown: ancestor 'work' is broken: ")
    with mounted(store, mountpoint, expect_log=expected) as mount:
        with (mountpoint / "leaf" / "memory.bin").open("rb", buffering=0) as old:
            replace_memory(store / "base", 21, BASE_PAGES)
            until_shown(mount, "base", "pinned")
            assert old.read() == image_of((0, BASE_PAGES), (1, [1]), (2, [2]))
        until(lambda: (mountpoint / "base" / "memory.bin").read_bytes() == new, "not the new base")
        pinned = (mountpoint / "pinned" / "memory.bin").read_bytes()
        assert pinned == image_of((21, BASE_PAGES), (4, [4]))
        assert "work: not shown: parent replaced: base/memory.bin is not the file" in mount.log()
        assert "leaf: not shown: ancestor 'work' is broken: parent replaced" in mount.log()


def test_broken_tags_are_served_once_they_are_fixed(public_path: Path, mountpoint: Path) -> None:
    store = public_path / "store"
    write_tag(store, "orphan", "base", layer=1)
    write_tag(store, "damaged", layer=2, numbers=BASE_PAGES)
    document = (store / "damaged" / "snapshot.json").read_text()
    write_document(store, "damaged", document[:-5])
    with mounted(store, mountpoint, expect_log=("not shown: ",)) as mount:
        assert shows(mountpoint)
        assert not (mountpoint / "orphan").exists()
        assert "orphan: not shown: " in mount.log()
        write_document(store, "damaged", document)
        until_shown(mount, "damaged")
        write_tag(store, "base")
        until_shown(mount, "base", "damaged", "orphan")
        image = (mountpoint / "orphan" / "memory.bin").read_bytes()
        assert image == image_of((0, BASE_PAGES), (1, [1]))
        (store / "base").rename(public_path / "away")
        until_shown(mount, "damaged")


def test_other_files_change(public_path: Path, mountpoint: Path) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    (store / "leaf" / "note").write_bytes(b"state of leaf")
    shown = mountpoint / "leaf" / "note"
    view = mountpoint / "leaf" / "memory.bin"
    with mounted(store, mountpoint):
        inode = view.stat().st_ino
        assert shown.read_bytes() == b"state of leaf"
        held = shown.open("rb", buffering=0)
        with held:
            for text in (b"longer than it was before", b"short"):
                (store / "leaf" / "note").write_bytes(text)
                until_equal(shown.read_bytes, text)
            new = store / "leaf" / "other"
            new.write_bytes(b"by another name")
            new.rename(store / "leaf" / "note")
            until(lambda: shown.read_bytes() == b"by another name", "it was not replaced")
            assert held.read() == b"short"
        document = json.loads((store / "leaf" / "snapshot.json").read_text()) | {"rootfs": "new"}
        write_document(store, "leaf", json.dumps(document))
        path = mountpoint / "leaf" / "snapshot.json"
        until(lambda: json.loads(path.read_text()).get("rootfs") == "new", "not the new document")
        (store / "leaf" / "vmstate").unlink()
        assert view.stat().st_ino == inode


@pytest.mark.parametrize("layout", ["forkd", "numbered"])
def test_a_tag_written_just_before_the_mount_is_served_at_once(
    layout: str, public_path: Path, mountpoint: Path
) -> None:
    store = public_path / "store"
    if layout == "forkd":
        names = ["base/memory.bin", "leaf/memory.bin"]
        write_chain(store, ["base", "leaf"])
    else:
        names = ["000-base.mem", "001-leaf.mem"]
        write_numbered(store, names)
    for path in store.rglob("*"):
        os.utime(path)
    with mounted(store, mountpoint):
        assert shows(mountpoint, "base", "leaf")
        path = mountpoint / "leaf" / os.path.basename(names[1])
        assert path.read_bytes() == image_of((0, BASE_PAGES), (1, [1]))


def test_an_ambiguous_source_keeps_the_served_images(public_path: Path, mountpoint: Path) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    expected = "the mount stays as it was until this is fixed: "
    with mounted(store, mountpoint, expect_log=(expected,)) as mount:
        age(write_layer(store / "000-other.mem", SIZE, [(0, signed(5, 0, PAGE))]))
        write_chain(store, ["base", "leaf", "new"])
        until(lambda: expected in mount.log(), "the log does not say so")
        assert shows(mountpoint, "base", "leaf")
        image = (mountpoint / "leaf" / "memory.bin").read_bytes()
        assert image == image_of((0, BASE_PAGES), (1, [1]))
        (store / "000-other.mem").unlink()
        until_shown(mount, "base", "leaf", "new")
        assert mount.log().count(expected) == 1


def test_a_source_that_is_deleted_and_made_anew(public_path: Path, mountpoint: Path) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    gone = f"the mount shows nothing until this is fixed: {store}: was deleted; it is served again"
    anew = f"{store}: another directory is at this path now, and is served instead"
    with mounted(store, mountpoint, expect_log=(gone, anew)) as mount:
        with (mountpoint / "leaf" / "memory.bin").open("rb", buffering=0) as old:
            shutil.rmtree(store)
            until_shown(mount)
            until(lambda: gone in mount.log(), "the log does not say so")
            # The mountpoint stays.
            assert mountpoint.stat().st_mode & 0o777 == 0o755
            write_tag(store, "leaf", layer=7, numbers=BASE_PAGES)
            until_shown(mount, "leaf")
            new = image_of((7, BASE_PAGES))
            until(lambda: (mountpoint / "leaf" / "memory.bin").read_bytes() == new, "not the new")
            assert old.read() == image_of((0, BASE_PAGES), (1, [1]))
        assert mount.log().count(gone) == mount.log().count(anew) == 1


def test_a_deleted_image_gives_its_space_back(public_path: Path, mountpoint: Path) -> None:
    """The kernel may remember its name for days."""
    store = write_chain(public_path / "store", ["base", "leaf"])
    with mounted(store, mountpoint) as mount:

        def holds_deleted() -> bool:
            links = Path(f"/proc/{mount.pid}/fd").iterdir()
            return any(os.readlink(fd).endswith("/memory.bin (deleted)") for fd in links)

        view = mountpoint / "leaf" / "memory.bin"
        with view.open("rb", buffering=0) as held:
            shutil.rmtree(store / "leaf")
            until_shown(mount, "base")
            until(holds_deleted, "the open file's layer was closed")
            assert held.read() == image_of((0, BASE_PAGES), (1, [1]))
        until(lambda: not holds_deleted(), "the layer is held open")
        assert (mountpoint / "base" / "memory.bin").read_bytes() == image_of((0, BASE_PAGES))
