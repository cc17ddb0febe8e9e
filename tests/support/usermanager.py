"""A real systemd, as a user's manager, in a mount namespace and a control group of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import skips
from tests.support.live import until

_SYSTEMD = "/lib/systemd/systemd"


@dataclass(frozen=True)
class Manager:
    """The running manager: its process, and the directory of its units and sockets."""

    pid: int
    root: Path

    @property
    def enter(self) -> list[str]:
        """What to put before a command so that it runs where the manager's services mount."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--wd=/", "--"]

    def systemctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`systemctl --user ...`, with its output as text."""
        return subprocess.run(
            ["systemctl", "--user", *arguments],
            env=os.environ | {"XDG_RUNTIME_DIR": str(self.root)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def shows(self, unit: str) -> dict[str, str]:
        """All that `systemctl show` says of the unit."""
        lines = self.systemctl("show", unit).stdout.splitlines()
        return {name: value for name, _, value in (line.partition("=") for line in lines)}


@contextmanager
def user_manager(root: Path) -> Iterator[Manager]:
    """A manager for the units in `root`/units, an existing directory.

    In its mount namespace /run is empty but for what tells systemd that the machine is its own.
    Afterwards none of its processes is left.
    """
    skips.require_mounts()
    groups = _own_groups(f"diffmergefs-test-{os.getpid()}")
    script = "\n".join(
        [
            *(f"echo $$ > {group}/cgroup.procs" for group in groups),
            "mount -t tmpfs none /run && mkdir -p /run/systemd/system",
            f"exec {_SYSTEMD} --user --log-target=console --unit=basic.target",
        ]
    )
    environment = {
        "HOME": str(root),
        "PATH": os.environ["PATH"],
        "XDG_RUNTIME_DIR": str(root),
        "SYSTEMD_UNIT_PATH": f"{root}/units:/usr/lib/systemd/user",
    }
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation=private", "sh", "-ec", script],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    manager = Manager(process.pid, root)
    try:
        until(lambda: _is_up(manager, process), "systemd did not come up")
        yield manager
    finally:
        process.kill()
        process.wait(20)
        for group in groups:
            _clear(group)


def _is_up(manager: Manager, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "systemd ended"
    return manager.shows("basic.target").get("ActiveState") == "active"


def _own_groups(name: str) -> list[Path]:
    # A new group in each hierarchy of systemd's: its manager moves what it finds in its own.
    made = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ")
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            path = Path(before.split(" ")[4]) / name
            try:
                path.mkdir()
            except OSError:
                pytest.skip(skips.NO_CGROUPS)
            made.append(path)
    if not made:
        pytest.skip(skips.NO_CGROUPS)
    return made


def _clear(group: Path) -> None:
    folders = [*sorted(group.rglob("*/"), reverse=True), group]

    def is_empty() -> bool:
        pids = [pid for folder in folders for pid in _members(folder)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        return not pids

    until(is_empty, "services of the manager live on")
    for folder in folders:
        folder.rmdir()


def _members(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
