"""The kernel's table of mounts: what lies where, without asking what is mounted.

Whoever looks up a path in a mount asks its server, which may hang, and then he hangs too. So paths
are judged here by the table and by their letters; only what lies in no mount of ours is looked at.
"""

from __future__ import annotations

import os

from diffmergefs.core.errors import NO_PROC, UnsupportedPlatformError
from diffmergefs.system import mountinfo
from diffmergefs.system.mountinfo import Mount

FILESYSTEM_TYPE = "fuse.diffmergefs"
_MAX_LINKS = 40


def mounts(process: str = "self") -> list[Mount]:
    """`mountinfo.mounts`, as a list. Raises UnsupportedPlatformError where there is no /proc."""
    try:
        return list(mountinfo.mounts(process))
    except FileNotFoundError as error:
        if os.path.exists("/proc/self"):
            raise
        raise UnsupportedPlatformError(NO_PROC) from error


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
