"""/proc/PID/mountinfo: which filesystem is mounted where, as far as a process sees it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Mount:
    """One mount, as proc(5) has it, with the escapes of its paths and options undone.

    `path` is where it is mounted, `device` the filesystem's (major:minor), `root` what of the
    filesystem stands there: `/`, but for bind mounts. `number` is the mount's own while it lasts,
    wherever it is moved to, and `parent` that of the mount on which it lies. `options` are those of
    the filesystem, in their order; two are the same mount whatever these are by now.
    """

    path: str
    device: str
    kind: str
    source: str
    number: int
    parent: int
    root: str
    options: tuple[str, ...] = field(default=(), compare=False)


def mounts(process: str = "self") -> Iterator[Mount]:
    """All mounts that the process sees, each after the one that it covers. Raises OSError."""
    # Only a newline ends a line here; the names may hold what else str.splitlines splits at.
    text = os.fsdecode(Path(f"/proc/{process}/mountinfo").read_bytes())
    return map(_mount, filter(None, text.split("\n")))


def mount_of(fd: int) -> Mount | None:
    """The mount that holds `fd`; None where nothing is listed for it, or there is no /proc.

    Not listed are the kernel's own mounts (of a memfd), those of another namespace or beyond a
    chroot, and those that were taken off lazily. Another mount of the same filesystem answers for
    such a one, if there is one, with an empty `path` and `root`. Raises OSError for a descriptor
    that is not open.
    """
    device = os.fstat(fd).st_dev
    try:
        info = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii")
        listed = list(mounts())
    except OSError:
        return None
    number = next(int(line.split()[1]) for line in info.splitlines() if line.startswith("mnt_id:"))
    for mount in listed:
        if mount.number == number:
            return mount
    same = f"{os.major(device)}:{os.minor(device)}"
    beside = next((mount for mount in listed if mount.device == same), None)
    return replace(beside, path="", root="") if beside else None


def _mount(line: str) -> Mount:
    fields, _, rest = line.partition(" - ")
    number, parent, device, root, path, *_ = fields.split(" ")
    kind, source, options = rest.split(" ", 2)
    return Mount(
        _unescaped(path),
        device,
        kind,
        _unescaped(source),
        int(number),
        int(parent),
        _unescaped(root),
        tuple(map(_unescaped, options.split(","))),
    )


def _unescaped(text: str) -> str:
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)
