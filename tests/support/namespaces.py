"""A mount namespace of a test's own, in which every user finds what a desktop gives him."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import commands, skips

_CLONE_NEWNS = 0x20000


@dataclass(frozen=True)
class Namespace:
    """A mount namespace, kept by a process that waits in it."""

    pid: int

    def run(
        self, argv: Sequence[str | Path], uid: int = 0, gid: int = 0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run the command in it as this user, without further groups; output as text."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", f"--setuid={uid}", f"--setgid={gid}"]
        settings: dict[str, Any] = {"check": False, "cwd": "/", "timeout": 60} | options
        return subprocess.run(
            [*enter, "--", *map(str, argv)], capture_output=True, text=True, **settings
        )

    def bind(self, source: Path, target: str) -> None:
        """Have the file or directory `source` stand at `target` too, in this namespace only."""
        done = self.run(["mount", "--bind", source, target])
        assert done.returncode == 0, done

    def make_writable(self, target: str, folder: Path) -> None:
        """Let the directory `target` be written to, in this namespace only.

        What is written goes to `folder`, an existing directory, and is lost with the namespace.
        """
        real = os.path.realpath(target)
        upper, work = folder / "upper", folder / "work"
        layers = f"lowerdir={real},upperdir={upper},workdir={work}"
        self.run(["mount", "-t", "tmpfs", "none", folder], check=True)
        self.run(["mkdir", upper, work], check=True)
        self.run(["mount", "-t", "overlay", "-o", layers, "overlay", real], check=True)

    def diffmergefs(
        self, uid: int, gid: int, *arguments: str | Path, environment: Mapping[str, str] = {}
    ) -> subprocess.CompletedProcess[str]:
        """The command line in it as this user, in a child of this process."""
        return commands.as_user(uid, gid, arguments, lambda: self._enter(environment))

    def _enter(self, environment: Mapping[str, str]) -> None:
        fd = os.open(f"/proc/{self.pid}/ns/mnt", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(fd)
        os.environ.update(environment)

    def detach_below(self, path: Path) -> None:
        """Take off every mount beneath this directory; daemons end once nobody uses them."""
        text = Path(f"/proc/{self.pid}/mountinfo").read_text(encoding="utf-8")
        places = [line.split(" ")[4] for line in text.splitlines()]
        for place in reversed(places):
            if place.startswith(f"{path}/"):
                self.run(["umount", "--lazy", place])

    def mount_options(self, path: Path) -> tuple[set[str], set[str], str] | None:
        """Of the top mount on this path: its own options, its filesystem's, and the type."""
        found = None
        text = Path(f"/proc/{self.pid}/mountinfo").read_text(encoding="utf-8")
        for line in text.splitlines():
            before, _, after = line.partition(" - ")
            fields, (kind, _, options) = before.split(" "), after.split(" ")
            if fields[4] == str(path):
                found = set(fields[5].split(",")), set(options.split(",")), kind
        return found


@contextmanager
def private_mounts(folder: Path) -> Iterator[Namespace]:
    """A mount namespace in which every user may open /dev/fuse, as on most machines.

    `folder` is an existing directory, which then holds a filesystem of the namespace's own. In the
    end everything that is mounted beneath `folder`'s parent in it is detached.
    """
    skips.require_mounts()
    skips.require_fuse()
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation=private", "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write(b"\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == b"\n"
        namespace = Namespace(holder.pid)
        device = folder / "fuse"
        namespace.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", folder], check=True)
        namespace.run(["mknod", "--mode=666", device, "c", "10", "229"], check=True)
        namespace.bind(device, "/dev/fuse")
        try:
            yield namespace
        finally:
            namespace.detach_below(folder.parent)
    finally:
        holder.kill()
        holder.communicate(timeout=60)
