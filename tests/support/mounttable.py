"""The kernel's table of mounts, read without touching what is mounted.

A stat() of a mount whose server hangs hangs too; /proc/self/mountinfo does not.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One line of the table: the mount's path, type and device number."""

    path: str
    fstype: str
    major: int
    minor: int


def entries() -> list[Entry]:
    """Every mount, in the order in which they were made."""
    found = []
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")[:-1]:
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        major, minor = fields[2].split(":")
        found.append(Entry(_unescape(fields[4]), after.split(" ")[0], int(major), int(minor)))
    return found


def at(path: str) -> list[Entry]:
    """The mounts on an absolute path without symbolic links; the last is on top."""
    return [entry for entry in entries() if entry.path == path]


def unmount(path: str) -> None:
    """Take the top mount off the path, lazily if it is still in use.

    Who is not root may do so with a FUSE mount of his own.
    """
    if os.geteuid() == 0:
        commands = [["umount", "--", path], ["umount", "-l", "--", path]]
    else:
        commands = [["fusermount3", "-u", "-z", "--", path]]
    results = []
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return
        results.append(result.stderr.strip())
    raise RuntimeError(f"cannot unmount {path}: {'; '.join(results)}")


def unmount_below(path: str) -> None:
    """Take off every mount on the path or anywhere under it, the newest first."""
    for entry in reversed(entries()):
        if entry.path == path or entry.path.startswith(f"{path}/"):
            unmount(entry.path)


def _unescape(field: str) -> str:
    """A path as it is: the table holds blanks and backslashes as octal numbers."""
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(field))
    return os.fsdecode(raw)
