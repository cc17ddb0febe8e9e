"""File handles (name_to_handle_at(2), NFS): an earlier mount's opens nothing in a later one."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from tests.support import skips
from tests.support.mounts import mounted
from tests.support.stores import write_tag

_AT_FDCWD = -100
_BYTES = 128

_libc = ctypes.CDLL(None, use_errno=True)


class Handle(ctypes.Structure):
    """struct file_handle."""

    _fields_ = (
        ("size", ctypes.c_uint),
        ("kind", ctypes.c_int),
        ("data", ctypes.c_ubyte * _BYTES),
    )


def handle_of(path: Path) -> Handle:
    handle, mount = Handle(size=_BYTES), ctypes.c_int()
    name = os.fsencode(path)
    found = _libc.name_to_handle_at(_AT_FDCWD, name, ctypes.byref(handle), ctypes.byref(mount), 0)
    assert found == 0, os.strerror(ctypes.get_errno())
    return handle


def content(mountpoint: Path, handle: Handle) -> bytes:
    folder = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = _libc.open_by_handle_at(folder, ctypes.byref(handle), os.O_RDONLY)
        number = ctypes.get_errno()
    finally:
        os.close(folder)
    if fd < 0:
        raise OSError(number, os.strerror(number))
    with open(fd, "rb") as file:
        return file.read()


def test_a_handle_of_one_mount_opens_no_image_of_the_next(
    public_path: Path, mountpoint: Path
) -> None:
    skips.require_root()
    store = public_path / "store"
    for layer, tag in enumerate(("one", "other")):
        write_tag(store, tag, layer=layer)
    paths = {tag: mountpoint / tag / "memory.bin" for tag in ("one", "other")}
    with mounted(store, mountpoint):
        first = {tag: handle_of(path) for tag, path in paths.items()}
        known = {tag: content(mountpoint, handle) for tag, handle in first.items()}
        assert known == {tag: path.read_bytes() for tag, path in paths.items()}
    with mounted(store, mountpoint):
        # Looked up in the other order, the images have each other's inode numbers.
        second = {tag: handle_of(paths[tag]) for tag in reversed(paths)}
        assert bytes(second["other"].data)[:8] == bytes(first["one"].data)[:8]
        for handle in first.values():
            with pytest.raises(OSError) as caught:
                content(mountpoint, handle)
            assert caught.value.errno == errno.ESTALE
        assert {tag: content(mountpoint, handle) for tag, handle in second.items()} == known
