"""Where a diff lies: real filesystems, each as a context manager that has files put there.

A place is called with `make`, which makes a fresh directory on a filesystem of a kind (the
fixture `filesystem`), and with `fill`, which writes files into a directory. It calls `fill` where,
and when, files can be written, and yields the directory in which a user then finds them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffmergefs.opening.filesystems import overlay_directories
from diffmergefs.system.mounttable import mount_of
from tests.support import faulty, loopfs, mounttable, skips

Make = Callable[[str], Path]
Fill = Callable[[Path], None]


@dataclass(frozen=True)
class Place:
    """A place with the name that its rows have in the test's output."""

    name: str
    filled: Callable[[Make, Fill], AbstractContextManager[Path]]


def directly(kind: str) -> Place:
    """Written on a filesystem of `loopfs.KINDS`, and read there."""

    @contextmanager
    def filled(make: Make, fill: Fill) -> Iterator[Path]:
        directory = make(kind)
        fill(directory)
        yield directory

    return Place(kind, filled)


def packed(kind: str) -> Place:
    """Written on ext4, and packed as a read-only filesystem (see `loopfs.packed`)."""

    @contextmanager
    def filled(make: Make, fill: Fill) -> Iterator[Path]:
        source = make("ext4")
        fill(source)
        with loopfs.packed(kind, source, make("ext4")) as root:
            yield root

    return Place(kind, filled)


def lower(of: Place, *options: str) -> Place:
    """In the lower directory of an overlay, which is the place `of`; its upper one is on ext4."""

    @contextmanager
    def filled(make: Make, fill: Fill) -> Iterator[Path]:
        with of.filled(make, fill) as below, overlay(make("ext4"), below, options) as merged:
            yield merged

    return Place(f"overlay, lower {of.name}", filled)


def upper(kind: str, below: Place | None = None) -> Place:
    """Written on an overlay with its upper directory on `kind`, its lower one too or `below`."""

    @contextmanager
    def filled(make: Make, fill: Fill) -> Iterator[Path]:
        lower = (below or directly(kind)).filled(make, _nothing)
        with lower as root, overlay(make(kind), root) as merged:
            fill(merged)
            yield merged

    return Place(f"overlay, upper {kind}" + (f" over {below.name}" if below else ""), filled)


def read_only(of: Place) -> Place:
    """In the lower one of two directories of an overlay that has no upper one."""

    @contextmanager
    def filled(make: Make, fill: Fill) -> Iterator[Path]:
        merged, other = make("ext4"), make("ext4")
        with of.filled(make, fill) as below:
            options = f"lowerdir={below}:{other}"
            mount: list[str | Path] = ["mount", "-t", "overlay", "-o", options, "overlay", merged]
            subprocess.run(mount, check=True)
            try:
                yield merged
            finally:
                mounttable.unmount(str(merged))

    return Place(f"overlay, only lower {of.name}", filled)


def in_a_container(of: Place) -> Place:
    """The overlay `of`, whose directories do not stand where mountinfo says."""

    @contextmanager
    def filled(make: Make, fill: Fill) -> Iterator[Path]:
        elsewhere = make("ext4")
        with of.filled(make, fill) as merged, ExitStack() as covers:
            subprocess.run(["mount", "--bind", merged, elsewhere], check=True)
            covers.callback(mounttable.unmount, str(elsewhere))
            fd = os.open(merged, os.O_RDONLY)
            mount = mount_of(fd)
            os.close(fd)
            assert mount is not None
            for directory in overlay_directories(mount.options):
                subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
                covers.callback(mounttable.unmount, directory)
            yield elsewhere

    return Place(f"{of.name}, in a container", filled)


@contextmanager
def overlay(directory: Path, below: Path, options: tuple[str, ...] = ()) -> Iterator[Path]:
    """The merged directory of an overlay whose lower directory is `below`."""
    with loopfs.overlay(directory, below, *options) as layers:
        yield layers.merged


def _nothing(directory: Path) -> None:
    pass


def fuse(*, statfs: bool) -> Place:
    """Written on ext4, and shown by a FUSE server of our own, which may not know statfs(2)."""

    @contextmanager
    def filled(make: Make, fill: Fill) -> Iterator[Path]:
        source, mountpoint = make("ext4"), make("ext4")
        fill(source)
        with faulty.mounted(source, mountpoint, statfs=statfs):
            yield mountpoint

    return Place("fuse" if statfs else "fuse without statfs", filled)


@contextmanager
def _fuse_overlayfs(make: Make, fill: Fill) -> Iterator[Path]:
    skips.require_fuse()
    root = make("ext4")
    for name in ("lower", "upper", "work", "merged"):
        (root / name).mkdir()
    merged = root / "merged"
    options = f"lowerdir={root}/lower,upperdir={root}/upper,workdir={root}/work"
    subprocess.run(["fuse-overlayfs", "-o", options, merged], check=True)
    try:
        fill(merged)
        yield merged
    finally:
        mounttable.unmount(str(merged))


FUSE_OVERLAYFS = Place("fuse-overlayfs", _fuse_overlayfs)


@contextmanager
def _memfd(make: Make, fill: Fill) -> Iterator[Path]:
    # Its own directory has a link to it, by which others find it.
    fd = os.memfd_create("diff")
    root = make("ext4")
    (root / "diff").symlink_to(f"/proc/{os.getpid()}/fd/{fd}")
    try:
        fill(root)
        # Nobody has it open for writing then.
        reader = os.open(root / "diff", os.O_RDONLY)
        os.dup2(reader, fd)
        os.close(reader)
        yield root
    finally:
        os.close(fd)


MEMFD = Place("memfd", _memfd)


@contextmanager
def _ramfs(make: Make, fill: Fill) -> Iterator[Path]:
    skips.require_mounts()
    root = make("ext4")
    subprocess.run(["mount", "-t", "ramfs", "ramfs", root], check=True)
    try:
        fill(root)
        yield root
    finally:
        mounttable.unmount(str(root))


RAMFS = Place("ramfs", _ramfs)
