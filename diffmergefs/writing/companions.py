"""The files that stand beside a snapshot's memory, copied into another directory."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import closing
from typing import NamedTuple

from diffmergefs.core import beneath
from diffmergefs.core.beneath import Root
from diffmergefs.core.failures import failures
from diffmergefs.core.identity import copied_bits
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.stores.snapshot import is_left_out, status_of
from diffmergefs.writing.flatten import flatten
from diffmergefs.writing.output import sync_directory


class Kept(NamedTuple):
    """What is not copied: files by their path as messages have it, and by device and inode."""

    paths: Collection[str]
    inodes: Collection[tuple[int, int]]

    def has(self, status: os.stat_result) -> bool:
        """Whether the file of `status` is among them, by whatever name."""
        return (status.st_dev, status.st_ino) in self.inodes


def copy_folder(fd: int, folder: str, target: str, kept: Kept) -> None:
    """Copy what is in the directory `fd`, open or with O_PATH, into the existing one `target`.

    `folder` is what messages and `kept` call it. Files (sparse, reflinked where possible),
    directories and symlinks (as they are, never followed) with their modes, by root with their
    owners, and files with their mtime; all is synced but `target` itself. Left out: what is `kept`,
    staging names, FIFOs, sockets, devices. ACLs and other extended attributes are not taken. Raises
    DiffMergeError, also where another directory has come to stand in the place of one within.
    """
    waiting = [("", target, os.fstat(fd))]
    finished: list[tuple[str, os.stat_result, int]] = []
    while waiting:
        source, into, known = waiting.pop()
        with failures(os.path.join(folder, source)), beneath.passing(fd, source) as here:
            if not os.path.samestat(os.fstat(here), known):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            mode = copied_bits(f"/proc/self/fd/{here}", known.st_mode)
            if source:
                finished.append((into, known, mode))
            for name, status in list(_entries(here)):
                path, place = os.path.join(source, name), os.path.join(into, name)
                called = os.path.join(folder, path)
                if is_left_out(name) or called in kept.paths:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    with failures(place):
                        os.mkdir(place, 0o700)
                    waiting.append((path, place, status))
                elif stat.S_ISLNK(status.st_mode):
                    _copy_symlink(here, name, place, status, called)
                elif stat.S_ISREG(status.st_mode) and not kept.has(status):
                    copy_file(here, name, place, called)
    # The innermost last opened first: a directory may come to forbid its owner to write in it.
    for place, status, mode in reversed(finished):
        take_over(place, status, mode)
        with failures(place):
            sync_directory(place)


def copy_file(root: Root, path: str, target: str, called: str | None = None) -> None:
    """Copy the regular file `path`, beneath `root`, to `target`, as `copy_folder` does.

    Messages call it `called`, by default `path`.
    """
    with failures(called or path):
        fd = beneath.open_regular(root, path)
        try:
            status = os.fstat(fd)
            mode = copied_bits(fd, status.st_mode)
        finally:
            os.close(fd)
    if status.st_size == 0:
        with failures(target):
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    else:
        with closing(Layer.open(path, root, called)) as layer:
            with failures(called or path):
                status, mode = layer.status, layer.mode
            flatten(MergedView([layer]), target)
    take_over(target, status, mode)
    with failures(target):
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def take_over(path: str, status: os.stat_result, mode: int) -> None:
    """Give the file or directory `path` this mode, and by root the owner of `status`.

    A symlink keeps its mode. Raises FileAccessError.
    """
    with failures(path):
        if os.geteuid() == 0:
            os.chown(path, status.st_uid, status.st_gid, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(path, mode)


def _entries(folder: int) -> Iterator[tuple[str, os.stat_result]]:
    fd = beneath.open_directory(folder)
    try:
        with os.scandir(fd) as entries:
            # In order: a copy removes a seal of its own name, and this puts it there afterwards.
            for entry in sorted(entries, key=lambda entry: entry.name):
                if status := status_of(entry):
                    yield entry.name, status
    finally:
        os.close(fd)


def _copy_symlink(folder: int, name: str, target: str, status: os.stat_result, called: str) -> None:
    with failures(called):
        handle = beneath.open_handle(folder, name)
        try:
            # Of the symlink itself, which O_PATH with O_NOFOLLOW opens (readlinkat(2)).
            leads_to = os.readlink("", dir_fd=handle)
        finally:
            os.close(handle)
    with failures(target):
        os.symlink(leads_to, target)
    take_over(target, status, 0)
