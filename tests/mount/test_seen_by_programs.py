"""What other programs see of a view: the table in docs/troubleshooting.md."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import skips
from tests.support.live import until
from tests.support.mounts import mounted
from tests.support.stores import SIZE, write_chain, write_tag

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_OPEN_TREE, _MOUNT_SETATTR = 428, 442
_OPEN_TREE_CLONE, _O_CLOEXEC = 1, os.O_CLOEXEC
_MOUNT_ATTR_IDMAP = 0x00100000
_IN_CREATE, _IN_MODIFY, _IN_DELETE, _IN_OPEN = 0x100, 0x2, 0x200, 0x20


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


def test_df_shows_the_images_and_nothing_free(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        columns = "--output=fstype,size,used,avail,iavail"
        command = ["df", "--block-size=1", columns, str(mountpoint)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        total = str(2 * SIZE)
        assert done.stdout.split("\n")[1].split() == ["fuse.diffmergefs", total, total, "0", "0"]


def test_inotify_tells_of_clients_and_of_no_new_tag(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        fd = _libc.inotify_init1(os.O_NONBLOCK)
        mask = _IN_CREATE | _IN_MODIFY | _IN_DELETE | _IN_OPEN
        assert _libc.inotify_add_watch(fd, os.fsencode(mountpoint), mask) >= 0
        try:
            write_tag(store, "new", layer=0)
            until(lambda: (mountpoint / "new").exists(), "it is not shown")
            with pytest.raises(BlockingIOError):
                os.read(fd, 4096)
            os.listdir(mountpoint)
            _, event, _, _ = struct.unpack_from("iIII", os.read(fd, 4096))
            assert event & _IN_OPEN
        finally:
            os.close(fd)


@contextmanager
def user_namespace() -> Iterator[int]:
    """A descriptor of a user namespace that maps every user to another one."""
    skips.require_user_namespaces()
    command = ["unshare", "--user", "cat"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"\n"
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child.pid}/{name}").write_text("0 100000 65536", encoding="ascii")
        fd = os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        child.kill()
        child.communicate()


def map_ids(path: Path, namespace: int) -> int:
    """The errno of an id-mapped mount of what is mounted on this path; 0 if it works."""
    flags = _OPEN_TREE_CLONE | _O_CLOEXEC
    tree = _libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)
    assert tree >= 0
    try:
        wanted = struct.pack("QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, namespace)
        number = _libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, wanted, len(wanted))
        return 0 if number == 0 else ctypes.get_errno()
    finally:
        os.close(tree)


def test_a_view_cannot_be_id_mapped(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    with mounted(store, mountpoint), user_namespace() as namespace:
        subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True, timeout=60)
        try:
            assert map_ids(tmp_path, namespace) == 0
            assert map_ids(mountpoint, namespace) == errno.EINVAL
        finally:
            subprocess.run(["umount", tmp_path], check=True, timeout=60)
