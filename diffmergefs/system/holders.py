"""Which processes have files of a mounted filesystem open or mapped, according to /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PROC = "/proc"


class Holder(NamedTuple):
    """A process that keeps a mount busy.

    `how` has one or more of 'mapped', 'open' and 'directory'. `command` is the kernel's name of
    the process, 15 bytes at most.
    """

    pid: int
    command: str
    how: tuple[str, ...]


class Found(NamedTuple):
    """The holders by pid, and how many processes we are not permitted to inspect."""

    holders: list[Holder]
    unseen: int


def holders(device: str, path: str) -> Found:
    """The processes that use files of the filesystem `device` (`major:minor`), mounted on `path`.

    A mapping is found in every mount namespace, a descriptor or a working directory in those where
    the filesystem is mounted. The filesystem itself, which may hang, is not accessed. Only root can
    inspect other users' processes; /proc may even hide them, and then they are not counted.
    Processes come and go during the search, so the result may be out of date.
    """
    found = []
    unseen = 0
    for name in sorted(filter(str.isdigit, os.listdir(PROC)), key=int):
        process = Path(PROC, name)
        try:
            how = tuple(_ways(process, device, path))
            if how:
                command = os.fsdecode((process / "comm").read_bytes()).removesuffix("\n")
                found.append(Holder(int(name), command, how))
        except PermissionError:
            unseen += 1
        except OSError:
            continue  # the process has ended
    return Found(found, unseen)


def _ways(process: Path, device: str, path: str) -> Iterator[str]:
    major, minor = map(int, device.split(":"))
    if _has_mapping((process / "maps").read_bytes(), b"%02x:%02x" % (major, minor)):
        yield "mapped"
    mounts = set(_mounts((process / "mountinfo").read_bytes(), device))
    if any(_mount_of(entry) in mounts for entry in (process / "fdinfo").iterdir()):
        yield "open"
    places = [os.readlink(process / link) for link in ("cwd", "root")] if mounts else []
    if any(place == path or place.startswith(f"{path}/") for place in places):
        yield "directory"


def _has_mapping(maps: bytes, device: bytes) -> bool:
    # address perms offset device inode path
    return any(line.split(b" ", 4)[3] == device for line in maps.split(b"\n") if line)


def _mounts(mountinfo: bytes, device: str) -> Iterator[bytes]:
    for line in mountinfo.split(b"\n")[:-1]:
        number, _, where, *_ = line.split(b" ", 3)
        if where == os.fsencode(device):
            yield number


def _mount_of(fdinfo: Path) -> bytes | None:
    # A stat of the descriptor would access the filesystem.
    try:
        lines = fdinfo.read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    found = (line.partition(b":\t") for line in lines)
    return next((value for name, _, value in found if name == b"mnt_id"), None)


def summary(found: Iterable[Holder], most: int) -> str:
    """The holders in one line, at most `most` by name: `12 qemu (mapped), 13 sh (open)`."""
    known = list(found)
    parts = [f"{one.pid} {one.command} ({', '.join(one.how)})" for one in known[:most]]
    if len(known) > most:
        parts.append(f"and {len(known) - most} more")
    return ", ".join(parts)
