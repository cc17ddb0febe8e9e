"""Real file systems for tests, on loop files or in memory.

The files' holes, extents and block sizes then are those that users meet, not
those of whichever file system /tmp happens to be on.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import mounttable, skips

#: The size of each file system. XFS wants 300 MB at least. Loop files are sparse.
SIZE = 512 * 1024 * 1024

_MKFS = {
    "ext2": ["mkfs.ext2", "-q", "-F"],
    "ext3": ["mkfs.ext3", "-q", "-F"],
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "ext4_1k": ["mkfs.ext4", "-q", "-F", "-b", "1024"],
    "ext4_bigalloc": ["mkfs.ext4", "-q", "-F", "-O", "bigalloc", "-C", "65536"],
    "ext4_inline": ["mkfs.ext4", "-q", "-F", "-O", "inline_data", "-I", "1024"],
    "xfs": ["mkfs.xfs", "-q"],
    "xfs16k": ["mkfs.xfs", "-q", "-b", "size=16384"],
    "btrfs": ["mkfs.btrfs", "-q"],
}
_TMPFS = {
    "tmpfs": f"size={SIZE},mode=755",
    "tmpfs_huge": f"size={SIZE},mode=755,huge=always",
    "tmpfs_within_size": f"size={SIZE},mode=755,huge=within_size",
    "tmpfs_advise": f"size={SIZE},mode=755,huge=advise",
}
#: What makes a filesystem that is read only of a directory, after which come its image and it.
_PACK = {
    "squashfs": lambda image, source: ["mksquashfs", source, image, "-quiet", "-no-progress"],
    "erofs": lambda image, source: ["mkfs.erofs", image, source],
}
#: A kind whose mount an older kernel refuses, and the reason to skip then.
_MAY_BE_REFUSED = {"xfs16k": skips.NO_BIG_BLOCKS} | dict.fromkeys(
    (kind for kind in _TMPFS if kind != "tmpfs"), skips.NO_HUGE_TMPFS
)

#: The kinds for which `made` can make a file system.
KINDS = (*_MKFS, *_TMPFS, "overlay")


@dataclass(frozen=True)
class Overlay:
    """An overlay mount: what is written in `merged` lands in `upper`, never in `lower`."""

    lower: Path
    upper: Path
    work: Path
    merged: Path


@contextmanager
def made(kind: str, under: Path, size: int = SIZE) -> Iterator[Path]:
    """A fresh file system of the kind, mounted in a new directory in `under`.

    `size` is that of the loop file; one in memory always has `SIZE`. Yields its
    root (mode 755). Skips the test where the machine cannot have it.
    Mount, loop device and loop file are gone afterwards, whatever happened.
    """
    if kind == "overlay":
        with made("ext4", under) as root, overlay(root) as layers:
            yield layers.merged
        return
    root = under / kind
    image = under / f"{kind}.img"
    root.mkdir()
    try:
        if kind in _TMPFS:
            skips.require_mounts()
            _mount(kind, ["mount", "-t", "tmpfs", "-o", _TMPFS[kind], "tmpfs", str(root)])
        else:
            skips.require_loop()
            with image.open("xb") as file:
                file.truncate(size)
            _run([*_MKFS[kind], str(image)])
            _ensure_loop_node()
            # "loop" has the kernel give the loop device up together with the mount.
            _mount(kind, ["mount", "-o", "loop", str(image), str(root)])
        root.chmod(0o755)
        yield root
    finally:
        mounttable.unmount_below(os.path.realpath(root))
        image.unlink(missing_ok=True)
        root.rmdir()


@contextmanager
def packed(kind: str, source: Path, under: Path) -> Iterator[Path]:
    """A read-only file system of the kind (squashfs, erofs) with `source`'s files.

    Its image and its mountpoint are new ones in the directory `under`. Yields its root.
    """
    skips.require_loop()
    image, root = under / f"{kind}.img", under / kind
    root.mkdir()
    try:
        _run(_PACK[kind](str(image), str(source)))
        _ensure_loop_node()
        _mount(kind, ["mount", "-t", kind, "-o", "loop,ro", str(image), str(root)])
        yield root
    finally:
        mounttable.unmount_below(os.path.realpath(root))
        image.unlink(missing_ok=True)
        root.rmdir()


@contextmanager
def overlay(directory: Path, lower: Path | None = None, *more: str) -> Iterator[Overlay]:
    """A fresh overlay mount whose directories are new ones in `directory`.

    `lower` stands in for the lower one of them; `more` are further mount options.
    """
    skips.require_mounts()
    names = ("lower", "upper", "work", "merged")
    layers = Overlay(*(lower or directory / n if n == "lower" else directory / n for n in names))
    for path in (layers.lower, layers.upper, layers.work, layers.merged):
        path.mkdir(mode=0o755, exist_ok=path == lower)
    dirs = f"lowerdir={layers.lower},upperdir={layers.upper},workdir={layers.work}"
    options = ",".join((dirs, *more))
    try:
        _mount("overlay", ["mount", "-t", "overlay", "-o", options, "overlay", str(layers.merged)])
        yield layers
    finally:
        mounttable.unmount_below(os.path.realpath(layers.merged))


def _mount(kind: str, command: list[str]) -> None:
    """Run the mount command; skip the test where the kernel has no such file system."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    if kind in _MAY_BE_REFUSED:
        pytest.skip(_MAY_BE_REFUSED[kind])
    # The mount has loaded the kernel's module by now, if there is one.
    if kind not in Path("/proc/filesystems").read_text(encoding="ascii").split():
        pytest.skip(skips.NO_KERNEL_FS)
    raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")


def _ensure_loop_node() -> None:
    """Make the node of the next free loop device, where no devtmpfs does it."""
    node = Path(_run(["losetup", "--find"]).strip())
    number = re.fullmatch(r"/dev/loop(\d+)", str(node))
    if number and not node.exists():
        os.mknod(node, 0o660 | stat.S_IFBLK, os.makedev(7, int(number[1])))


def _run(command: list[str]) -> str:
    """Run the command; what it printed, or an error that tells what it said."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout
