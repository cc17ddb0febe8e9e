"""Who keeps a mount busy, and how `umount` names them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffmergefs.system.mounttable import Holder, holders, mount_entry
from tests.support.commands import diffmergefs, one_line
from tests.support.mounts import mounted
from tests.support.namespaces import Namespace, private_mounts
from tests.support.stores import write_chain
from tests.support.users import NOBODY

BUSY = 15

# A file of the first argument in use in the way that the second one says, until stdin ends.
_USER = """
import ctypes, mmap, os, sys
path, way, name = sys.argv[1:]
libc = ctypes.CDLL(None)
libc.prctl(15, os.fsencode(name), 0, 0, 0)
if way == "directory":
    os.chdir(os.path.dirname(path))
else:
    fd = os.open(path, os.O_RDONLY)
    if way in ("mapped", "both"):
        # Python's own mmap keeps a descriptor.
        size = ctypes.c_size_t(os.fstat(fd).st_size)
        libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, ctypes.c_long(0))
    if way == "mapped":
        os.close(fd)
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


@contextmanager
def user_of(path: Path, way: str, name: str = "python3", *enter: str) -> Iterator[int]:
    """A process that uses the file; its pid."""
    command = [*enter, sys.executable, "-c", _USER, str(path), way, name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/"
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"\n"
            yield process.pid
        finally:
            process.kill()


def holders_at(mountpoint: Path) -> list[Holder]:
    entry = mount_entry(str(mountpoint))
    assert entry is not None
    return holders(entry.device, entry.path).holders


def test_each_way_to_use_a_mount_is_seen(store: Path, mountpoint: Path) -> None:
    memory = mountpoint / "leaf" / "memory.bin"
    with mounted(store, mountpoint):
        assert holders_at(mountpoint) == []
        with (
            user_of(memory, "mapped", "qemu-system-x86_64") as mapped,
            user_of(memory, "open", "a\nb") as opened,
            user_of(memory, "directory") as inside,
            user_of(store / "leaf" / "memory.bin", "mapped"),
        ):
            expected = [
                Holder(mapped, "qemu-system-x86", ("mapped",)),
                Holder(opened, "a\nb", ("open",)),
                Holder(inside, "python3", ("directory",)),
            ]
            assert holders_at(mountpoint) == sorted(expected)
        with user_of(memory, "both") as both:
            assert holders_at(mountpoint) == [Holder(both, "python3", ("mapped", "open"))]
        assert holders_at(mountpoint) == []


def test_umount_is_refused_and_names_them(store: Path, mountpoint: Path) -> None:
    memory = mountpoint / "leaf" / "memory.bin"
    with (
        mounted(store, mountpoint),
        user_of(memory, "mapped", "firecracker") as vm,
        user_of(memory, "open", "a\nb\x1b") as other,
    ):
        line = one_line(diffmergefs("umount", mountpoint), BUSY)
        known = {vm: f"{vm} firecracker (mapped)", other: f"{other} a\\nb\\x1b (open)"}
        users = ", ".join(known[pid] for pid in sorted(known))
        # Not even root may look into a process that has more rights, as outside of a container.
        line = re.sub(r" \(\d+ could not be inspected\)", "", line)
        assert line == (
            f"diffmergefs: {mountpoint}: files of it are open by {users}; stop the VMs that use it,"
            " or detach it with --lazy: it is then served until the last file is closed\n"
        )
        assert mount_entry(str(mountpoint)) is not None


@pytest.fixture
def namespace(public_path: Path) -> Iterator[Namespace]:
    (public_path / "dev").mkdir()
    with private_mounts(public_path / "dev") as found:
        yield found


def test_a_vm_in_a_mount_namespace_of_its_own_is_named(
    store: Path, mountpoint: Path, public_path: Path
) -> None:
    """As a jailer puts it there: its mount of the view is another one."""
    with mounted(store, mountpoint):
        enter = ["unshare", "--mount", "--propagation=private"]
        for way in ("mapped", "open"):
            with user_of(mountpoint / "leaf" / "memory.bin", way, "vm", *enter) as pid:
                assert holders_at(mountpoint) == [Holder(pid, "vm", (way,))]


def test_an_ordinary_user_is_told_that_he_sees_his_own_only(
    namespace: Namespace, store: Path, public_path: Path
) -> None:
    home = public_path / "home"
    (home / "mnt").mkdir(parents=True)
    for path in (home, home / "mnt", *store.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    options = [f"--log={home}/log", f"--state-dir={home}/state"]
    done = namespace.diffmergefs(NOBODY, NOBODY, "mount", *options, store, home / "mnt")
    assert done.returncode == 0, done
    memory = home / "mnt" / "leaf" / "memory.bin"
    enter = ["nsenter", f"--target={namespace.pid}", "--mount"]
    enter += [f"--setuid={NOBODY}", f"--setgid={NOBODY}"]
    # The system's own program: he may not be able to read the virtual environment.
    with subprocess.Popen(
        [*enter, "--", "/bin/sh", "-c", f"exec 3<{memory}; echo; exec sleep 60"],
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"\n"
            line = one_line(namespace.diffmergefs(NOBODY, NOBODY, "umount", home / "mnt"), BUSY)
            unseen = "(other users' processes are not visible)"
            assert re.search(
                rf"open by {process.pid} (sh|sleep) \(open\) {re.escape(unseen)}; stop", line
            )
        finally:
            process.kill()
    done = namespace.diffmergefs(NOBODY, NOBODY, "umount", home / "mnt")
    assert done.returncode == 0, done
