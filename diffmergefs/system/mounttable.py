"""The kernel's table of mounts, read without touching what is mounted.

A lookup of a path inside a mount asks the mount's server. If that server hangs, the caller hangs
too. So these functions decide by the table and the text of a path alone; they look at a path
itself only where it lies in no mount of ours.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffmergefs.core.errors import NO_PROC, UnsupportedPlatformError

FILESYSTEM_TYPE = "fuse.diffmergefs"
_MAX_LINKS = 40
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


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


def mounts(process: str = "self") -> list[Mount]:
    """All mounts that the process sees, each after the one that it covers.

    Raises OSError, and UnsupportedPlatformError if /proc is not mounted.
    """
    try:
        table = Path(f"/proc/{process}/mountinfo").read_bytes()
    except FileNotFoundError as error:
        if os.path.exists("/proc/self"):
            raise
        raise UnsupportedPlatformError(NO_PROC) from error
    # Only a newline ends a line here; names may hold the other characters at which
    # str.splitlines splits.
    return [_mount(line) for line in os.fsdecode(table).split("\n") if line]


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
        listed = mounts()
    except (OSError, UnsupportedPlatformError):
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


class MountTable:
    """The mounts that this process sees, as they were when it was read. Raises OSError."""

    def __init__(self) -> None:
        self.entries = mounts()
        self.points = {entry.path for entry in self.entries}
        numbers = {entry.number for entry in self.entries}
        # Those whose parent is not seen lie on the root, which the table may lack (chroot(2)).
        self._children = {
            (entry.parent if entry.parent in numbers else None, entry.path): entry
            for entry in self.entries
            if entry.parent != entry.number
        }

    def over(self, path: str) -> Mount | None:
        """The mount on which the real, absolute `path` lies; none that is covered.

        None where the table lacks it.
        """
        here: Mount | None = None
        prefix = ""
        for name in path.rstrip("/").split("/"):
            prefix = f"{prefix.rstrip('/')}/{name}"
            while found := self._children.get((here.number if here else None, prefix)):
                here = found
        return here

    def is_ours(self, path: str) -> bool:
        """Whether the real, absolute `path` lies on a diffmergefs."""
        found = self.over(path)
        return found is not None and found.kind == FILESYSTEM_TYPE


def mount_over(path: str) -> Mount | None:
    """The mount on which the real, absolute `path` lies, or None. Never asks the mount."""
    return MountTable().over(path)


def mount_entry(path: str) -> Mount | None:
    """The topmost mount on exactly the real, absolute `path`, or None. Never asks the mount."""
    found = mount_over(path)
    return found if found is not None and found.path == path else None


def resolved(path: str) -> str:
    """The real, absolute path, by the table alone from where it enters a mount of ours on.

    What is missing stays as it is, and so do symlinks beyond the 40th.
    """
    table = MountTable()
    here, links = "/", 0
    names = _names(path if path.startswith("/") else os.path.join(os.getcwd(), path))
    while names:
        name = names.pop()
        step = os.path.dirname(here) if name == ".." else os.path.join(here, name)
        if name == ".." or step in table.points or links == _MAX_LINKS or table.is_ours(here):
            here = step
            continue
        try:
            target = os.readlink(step)
        except OSError:
            here = step
        else:
            links += 1
            here = "/" if target.startswith("/") else here
            names += _names(target)
    return here


def _names(path: str) -> list[str]:
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def in_other_namespaces(device: str, source: str) -> list[str]:
    """Where the diffmergefs `device` of `source` is mounted in mount namespaces that this process
    is not in.

    Each with a process of that namespace, as far as processes can be looked into. Once a filesystem
    is gone, the kernel gives its device number to the next one, whosever that is.
    """
    found = []
    seen = {os.readlink("/proc/self/ns/mnt")}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            space = os.readlink(f"/proc/{name}/ns/mnt")
            known = [] if space in seen else mounts(name)
        except OSError:
            continue  # it has ended, or is somebody else's
        seen.add(space)
        mine = (FILESYSTEM_TYPE, device, source)
        places = [m.path for m in known if (m.kind, m.device, m.source) == mine]
        found += [f"{place} (in the namespace of process {name})" for place in places]
    return found


def enter_own_namespace() -> bool:
    """Move this process, before it has threads, into a new mount namespace; False if it may not.

    Whatever is still mounted in it when the last of its processes ends is unmounted then.
    """
    libc = ctypes.CDLL(None)
    if libc.unshare(_CLONE_NEWNS) != 0:
        return False
    return bool(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None) == 0)
