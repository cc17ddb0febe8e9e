"""The kernel's table of mounts and who uses one, read without touching what is mounted.

A lookup of a path inside a mount asks the mount's server. If that server hangs, the caller hangs
too. So these functions decide by the table and the text of a path alone; they look at a path
itself only where it lies in no mount of ours.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from diffmergefs.core.errors import NO_PROC, UnsupportedPlatformError

FILESYSTEM_TYPE = "fuse.diffmergefs"
PROC = "/proc"
_MAX_LINKS = 40
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


@dataclass(frozen=True)
class Mount:
    """One mount of /proc/PID/mountinfo (proc(5)), with the escapes of paths and options undone.

    `path` is where it is mounted, `device` the filesystem's major:minor, `root` the part of the
    filesystem that is mounted: `/`, except for bind mounts. `number` identifies the mount while it
    exists, wherever it is moved; `parent` is the number of the mount that it lies on. `options` are
    the filesystem's, in order; they are not compared, since a remount can change them.
    """

    path: str
    device: str
    kind: str
    source: str
    number: int
    parent: int
    root: str
    options: tuple[str, ...] = field(default=(), compare=False)

    @property
    def is_ours(self) -> bool:
        """Whether it is a diffmergefs mount."""
        return self.kind == FILESYSTEM_TYPE

    @property
    def owner(self) -> tuple[int, int] | None:
        """The uid and gid of the user that mounted it; None if that is not a FUSE mount."""
        known = dict(option.split("=", 1) for option in self.options if "=" in option)
        return (int(known["user_id"]), int(known["group_id"])) if "user_id" in known else None


def mounts(process: str = "self") -> list[Mount]:
    """All mounts that the process sees, each after the one that it covers.

    Raises OSError, and UnsupportedPlatformError if /proc is not mounted.
    """
    try:
        table = Path(f"{PROC}/{process}/mountinfo").read_bytes()
    except FileNotFoundError as error:
        if os.path.exists("/proc/self"):
            raise
        raise UnsupportedPlatformError(NO_PROC) from error
    # Only a newline ends a line here; names may hold the other characters at which
    # str.splitlines splits.
    return [_mount(line) for line in os.fsdecode(table).split("\n") if line]


def mount_of(fd: int) -> Mount | None:
    """The mount that holds `fd`; None if no mount is listed for it, or there is no /proc.

    The kernel's own mounts (for example of a memfd), mounts of another namespace or outside a
    chroot, and lazily unmounted ones are not listed. Then the result is another mount of the same
    filesystem, if there is one, with an empty `path` and `root`. Raises OSError for a descriptor
    that is not open.
    """
    device = os.fstat(fd).st_dev
    try:
        number = mount_number(f"/proc/self/fdinfo/{fd}")
        listed = mounts()
    except (OSError, UnsupportedPlatformError):
        return None
    if mount := next((mount for mount in listed if mount.number == number), None):
        return mount
    same = f"{os.major(device)}:{os.minor(device)}"
    beside = next((mount for mount in listed if mount.device == same), None)
    return replace(beside, path="", root="") if beside else None


def mount_number(fdinfo: str | Path) -> int:
    """The number of the mount that holds a descriptor, by its /proc/PID/fdinfo. Raises OSError.

    A stat of the descriptor would access the filesystem.
    """
    with open(fdinfo, "rb") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(b"mnt_id:"))


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
    """A snapshot of the mounts that this process sees. Raises OSError."""

    def __init__(self) -> None:
        self.entries = mounts()
        self.points = {entry.path for entry in self.entries}
        numbers = {entry.number for entry in self.entries}
        # A mount whose parent is not listed lies on the root, which may be missing (chroot(2)).
        self._children = {
            (entry.parent if entry.parent in numbers else None, entry.path): entry
            for entry in self.entries
            if entry.parent != entry.number
        }

    def over(self, path: str) -> Mount | None:
        """The topmost mount that the real, absolute `path` lies on; None if it is not listed."""
        here: Mount | None = None
        prefix = ""
        for name in path.rstrip("/").split("/"):
            prefix = f"{prefix.rstrip('/')}/{name}"
            while found := self._children.get((here.number if here else None, prefix)):
                here = found
        return here

    def is_ours(self, path: str) -> bool:
        """Whether the real, absolute `path` lies on a diffmergefs mount."""
        found = self.over(path)
        return found is not None and found.is_ours


def mount_over(path: str) -> Mount | None:
    """The mount that the real, absolute `path` lies on, or None. Never accesses the mount."""
    return MountTable().over(path)


def mount_entry(path: str) -> Mount | None:
    """The topmost mount on exactly the real, absolute `path`, or None. Never accesses the mount."""
    found = mount_over(path)
    return found if found is not None and found.path == path else None


def resolved(path: str) -> str:
    """The real, absolute path. What lies in a mount of ours is resolved by its text alone.

    Components that do not exist stay as they are, and so do symlinks after the 40th.
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
    """Where the diffmergefs `device` of `source` is mounted in other mount namespaces.

    Each place is followed by the pid of a process in that namespace; only processes that this one
    may inspect are searched. The source is compared too: once a filesystem is gone, the kernel
    reuses its device number for any other.
    """
    found = []
    seen = {os.readlink("/proc/self/ns/mnt")}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            space = os.readlink(f"/proc/{name}/ns/mnt")
            known = [] if space in seen else mounts(name)
        except OSError:
            continue  # the process has ended, or this one may not inspect it
        seen.add(space)
        mine = (FILESYSTEM_TYPE, device, source)
        places = [m.path for m in known if (m.kind, m.device, m.source) == mine]
        found += [f"{place} (in the namespace of process {name})" for place in places]
    return found


def enter_own_namespace() -> bool:
    """Move this process into a new mount namespace; False if it is not permitted.

    Call it before the process has threads. When the last process of the namespace ends, the kernel
    unmounts whatever is still mounted there.
    """
    libc = ctypes.CDLL(None)
    if libc.unshare(_CLONE_NEWNS) != 0:
        return False
    return bool(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None) == 0)


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
    numbers = {mount.number for mount in mounts(process.name) if mount.device == device}
    if numbers and any(_is_on(numbers, entry) for entry in (process / "fdinfo").iterdir()):
        yield "open"
    places = [os.readlink(process / link) for link in ("cwd", "root")] if numbers else []
    if any(place == path or place.startswith(f"{path}/") for place in places):
        yield "directory"


def _has_mapping(maps: bytes, device: bytes) -> bool:
    # address perms offset device inode path
    return any(line.split(b" ", 4)[3] == device for line in maps.split(b"\n") if line)


def _is_on(numbers: Collection[int], fdinfo: Path) -> bool:
    try:
        return mount_number(fdinfo) in numbers
    except FileNotFoundError:
        return False  # the descriptor was closed


def summary(found: Iterable[Holder], most: int) -> str:
    """The holders in one line, at most `most` by name: `12 qemu (mapped), 13 sh (open)`."""
    known = list(found)
    parts = [f"{one.pid} {one.command} ({', '.join(one.how)})" for one in known[:most]]
    if len(known) > most:
        parts.append(f"and {len(known) - most} more")
    return ", ".join(parts)
