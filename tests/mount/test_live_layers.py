"""Law 6 in a live mount: what happens if a layer's file changes."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.live import held, until, until_equal
from tests.support.mounts import mounted
from tests.support.stores import age, pages, write_tag

SIZE = 1024 * PAGE
BASE_PAGES = (0, 1, 512, 513, 700)
DIFF_PAGES = (0, 512, 600)
# A page read before the change; one of the diff; one of the base; one of no layer.
SEEN, OWN, BASES, NOBODYS = 0, 512, 700, 900

CHANGED = "the layer changed under its views"


def truncate(path: Path) -> None:
    os.truncate(path, SIZE // 2)


def grow(path: Path) -> None:
    os.truncate(path, SIZE + PAGE)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(OWN * PAGE)
        file.write(signed(99, OWN * PAGE, PAGE))


def overwrite_elsewhere(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(NOBODYS * PAGE)
        file.write(signed(99, NOBODYS * PAGE, PAGE))


def punch(path: Path) -> None:
    command = ["fallocate", "-p", "-o", str(OWN * PAGE), "-l", str(PAGE), str(path)]
    subprocess.run(command, check=True, timeout=60)


def punch_and_hide(path: Path) -> None:
    status = path.stat()
    punch(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    new = write_layer(path.with_name("new"), SIZE, pages(98, DIFF_PAGES))
    age(new)
    new.rename(path)


def read_a_hole_through_a_mapping(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert view[NOBODYS * PAGE] == 0


# The log line of each change: the layer is lost to its views.
HARMFUL: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncate": (truncate, f"it ends before byte {(OWN + 1) * PAGE}, it had {SIZE}"),
    "grow": (grow, f"its size moved from {SIZE} to {SIZE + PAGE}"),
    "overwrite": (overwrite, "its mtime moved from"),
    "elsewhere": (overwrite_elsewhere, "its mtime moved from"),
    "touch": (os.utime, "its mtime moved from"),
    "punch": (punch, "its mtime moved from"),
    "hidden-punch": (punch_and_hide, "data extents are gone"),
}
HARMLESS: dict[str, Callable[[Path], object]] = {
    "replace": replace,
    "rename": lambda path: path.rename(path.with_name("renamed")),
    "chmod": lambda path: path.chmod(0o444),
    "chown": lambda path: os.chown(path, 12345, 12345),
    "link": lambda path: os.link(path, path.with_name("linked")),
    "unlink": os.unlink,
    "xattr": lambda path: os.setxattr(path, "trusted.test", b"value"),
    "fsync": lambda path: os.fsync(os.open(path, os.O_RDONLY)),
    "hole-reader": read_a_hole_through_a_mapping,
}
CHANGES = {name: change for name, (change, _) in HARMFUL.items()} | HARMLESS


def write_store(store: Path) -> list[str]:
    """Write a base, and a diff for each kind of change. Returns the diffs' tags."""
    write_tag(store, "base", size=SIZE, numbers=BASE_PAGES)
    tags = ["untouched", *CHANGES]
    for n, tag in enumerate(tags, 1):
        write_tag(store, tag, "base", layer=n, numbers=DIFF_PAGES, size=SIZE)
    return tags


def expected_image(layer: int) -> bytes:
    return overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(layer, DIFF_PAGES)])


def page(fd: int, number: int) -> bytes | int | None:
    """A page of the file, or the errno."""
    try:
        return os.pread(fd, PAGE, number * PAGE)
    except OSError as error:
        return error.errno


def open_views(mount: Path, tags: list[str]) -> dict[str, int]:
    fds = {}
    for tag in tags:
        fds[tag] = os.open(mount / tag / "memory.bin", os.O_RDONLY)
        os.posix_fadvise(fds[tag], 0, 0, os.POSIX_FADV_RANDOM)
    return fds


def warnings_of(log: str, tag: str) -> list[str]:
    return [line for line in log.splitlines() if f" {tag}/memory.bin: {CHANGED}" in line]


@pytest.mark.timeout(100)
def test_every_change_of_a_layer(real_fs: Path, mountpoint: Path) -> None:
    store = real_fs / "store"
    tags = write_store(store)
    with mounted(store, mountpoint, expect_log=(CHANGED, "not shown: ")) as mount:
        fds = open_views(mountpoint, tags)
        inodes = {tag: os.fstat(fd).st_ino for tag, fd in fds.items()}
        try:
            for n, tag in enumerate(tags, 1):
                assert page(fds[tag], SEEN) == signed(n, SEEN * PAGE, PAGE)
            for tag, change in CHANGES.items():
                change(store / tag / "memory.bin")
            for n, tag in enumerate(tags, 1):
                image = expected_image(n)
                own = image[OWN * PAGE :][:PAGE] if tag not in HARMFUL else errno.EIO
                for _ in range(2):
                    assert page(fds[tag], OWN) == own, tag
                    # Cached pages stay, and so do the pages of other layers.
                    for number in (SEEN, BASES, NOBODYS):
                        assert page(fds[tag], number) == image[number * PAGE :][:PAGE], tag
                assert os.fstat(fds[tag]).st_size == SIZE
            log = mount.log()
            for tag in tags:
                found = warnings_of(log, tag)
                assert len(found) == (tag in HARMFUL), found
                if tag in HARMFUL:
                    assert HARMFUL[tag][1] in found[0]
            if "tmpfs" in str(real_fs):
                assert f"{PAGE} bytes of holes became written zeros: still as it was" in log
            assert os.fstat(fds["untouched"]).st_ino == inodes["untouched"]
            _come_back(mountpoint, fds, inodes, tags)
        finally:
            for fd in fds.values():
                os.close(fd)


def _come_back(mount: Path, fds: dict[str, int], inodes: dict[str, int], tags: list[str]) -> None:
    """A changed chain gets a new inode. Old handles stay as they were."""
    rewritten = bytearray(expected_image(tags.index("overwrite") + 1))
    rewritten[OWN * PAGE : (OWN + 1) * PAGE] = signed(99, OWN * PAGE, PAGE)
    punched = bytearray(expected_image(tags.index("hidden-punch") + 1))
    punched[OWN * PAGE : (OWN + 1) * PAGE] = signed(0, OWN * PAGE, PAGE)
    touched = expected_image(tags.index("touch") + 1)
    new_images = {
        "overwrite": rewritten,
        "hidden-punch": punched,
        "touch": touched,
        "replace": expected_image(98),
    }
    for tag, image in new_images.items():
        path = mount / tag / "memory.bin"

        def is_new(path: Path = path, old: int = inodes[tag]) -> bool:
            return path.exists() and path.stat().st_ino != old

        until(is_new, f"{tag} did not come back")
        assert path.stat().st_ino not in inodes.values()
        assert path.read_bytes() == image
        old = signed(tags.index(tag) + 1, 600 * PAGE, PAGE)
        assert page(fds[tag], 600) == (old if tag == "replace" else errno.EIO)
    for tag in ("link", "xattr", "fsync", "hole-reader"):
        assert (mount / tag / "memory.bin").stat().st_ino == inodes[tag]
    for tag in ("truncate", "grow", "rename", "unlink"):
        until_equal((mount / tag).exists, False)
    assert page(fds["unlink"], 600) == signed(tags.index("unlink") + 1, 600 * PAGE, PAGE)


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_explicit_layers_and_a_mapping(
    kind: str, filesystem: Callable[[str], Path], mountpoint: Path
) -> None:
    folder = filesystem(kind)
    base = write_layer(folder / "base", SIZE, pages(0, BASE_PAGES))
    diff = write_layer(folder / "diff", SIZE, pages(1, DIFF_PAGES))
    age(base, diff)
    options = ("--base", str(base), "--diff", str(diff))
    with mounted(None, mountpoint, *options, expect_log=(CHANGED,)) as mount:
        view = mountpoint / "base"
        with held(view) as holder:
            assert holder.read(SEEN, PAGE) == signed(1, 0, PAGE)
            overwrite(diff)
            assert holder.read(SEEN, PAGE) == signed(1, 0, PAGE)
            assert holder.read(BASES * PAGE, PAGE) == signed(0, BASES * PAGE, PAGE)
            assert holder.read(OWN * PAGE, PAGE) == b""
            assert holder.process.wait(60) == -signal.SIGBUS
        with pytest.raises(OSError, match="Input/output error"):
            view.read_bytes()
        assert mount.log().count(CHANGED) == 1
        assert f"{diff}: {CHANGED}: its mtime moved" in mount.log()


def test_a_truncated_base_and_two_images(public_path: Path, mountpoint: Path) -> None:
    """A shared layer is lost to both views, with one log line."""
    store = public_path / "store"
    for name, tags in (("a", ("a0", "a1", "a2")), ("b", ("b0", "b1"))):
        for n, tag in enumerate(tags):
            numbers = [n + 1] if n else range(4)
            write_tag(store, tag, f"{name}{n - 1}" if n else None, layer=n, numbers=numbers)
    expected = (CHANGED, "not shown: ")
    with mounted(store, mountpoint, expect_log=expected) as mount:
        fds = open_views(mountpoint, ["a0", "a1", "a2", "b1"])
        try:
            os.truncate(store / "a0" / "memory.bin", PAGE)
            assert [page(fds[tag], 0) for tag in ("a0", "a1", "a2")] == [errno.EIO] * 3
            assert page(fds["a1"], 2) == signed(1, 2 * PAGE, PAGE)
            assert page(fds["a2"], 2) == signed(1, 2 * PAGE, PAGE)
            assert page(fds["b1"], 3) == signed(0, 3 * PAGE, PAGE)
            assert len(warnings_of(mount.log(), "a0")) == 1
            until(lambda: not (mountpoint / "a1").exists(), "a1 is still there")
            assert (mountpoint / "b1" / "memory.bin").read_bytes()[3 * PAGE :][:PAGE] == (
                signed(0, 3 * PAGE, PAGE)
            )
        finally:
            for fd in fds.values():
                os.close(fd)
