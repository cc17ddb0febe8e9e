"""/proc/self/mountinfo: the mount that holds an open file, as far as this process sees it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Mount(NamedTuple):
    """One mount, as proc(5) has it, with the escapes of its paths and options undone.

    `device` is the filesystem's, as in `st_dev`. `path` is where it is mounted, and `root` the
    directory of its filesystem that stands there; both are empty where only another mount of the
    same filesystem is listed. `options` are those of the filesystem, in their order.
    """

    device: int
    root: str
    path: str
    kind: str
    options: tuple[str, ...]


def mount_of(fd: int) -> Mount | None:
    """The mount that holds `fd`; None where nothing is listed for it, or there is no /proc.

    Not listed are the kernel's own mounts (of a memfd), those of another namespace or beyond a
    chroot, and those that were taken off lazily. Another mount of the same filesystem answers for
    such a one, if there is one. Raises OSError for a descriptor that is not open.
    """
    device = os.fstat(fd).st_dev
    try:
        info = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii")
        table = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    except OSError:
        return None
    number = next(line.split()[1] for line in info.splitlines() if line.startswith("mnt_id:"))
    same = f"{os.major(device)}:{os.minor(device)}"
    beside = None
    for line in _lines(table):
        of, _, of_device, _ = line.split(" ", 3)
        if of == number:
            return _mount(line)
        if of_device == same and beside is None:
            beside = line
    return _mount(beside)._replace(root="", path="") if beside else None


def _lines(table: str) -> Iterator[str]:
    # Only a newline ends a line here; the names may hold what else str.splitlines splits at.
    return (line for line in table.split("\n") if line)


def _mount(line: str) -> Mount:
    fields, _, rest = line.partition(" - ")
    _, _, device, root, path, *_ = fields.split(" ")
    kind, _, options = rest.split(" ", 2)
    major, minor = device.split(":")
    return Mount(
        os.makedev(int(major), int(minor)),
        _unescaped(root),
        _unescaped(path),
        kind,
        tuple(map(_unescaped, options.split(","))),
    )


def _unescaped(field: str) -> str:
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(field))
    return os.fsdecode(raw)
