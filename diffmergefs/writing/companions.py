"""Copying a snapshot's other files into a new directory: the files beside its memory file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import closing
from typing import NamedTuple

from diffmergefs.core import beneath
from diffmergefs.core.beneath import Root
from diffmergefs.core.errors import failures
from diffmergefs.core.identity import copied_bits
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.stores.snapshot import is_left_out, status_of
from diffmergefs.writing.flatten import flatten
from diffmergefs.writing.output import sync_directory


class Excluded(NamedTuple):
    """Files not to copy: by path, as in messages, and by device and inode."""

    paths: Collection[str]
    inodes: Collection[tuple[int, int]]

    def has(self, status: os.stat_result) -> bool:
        """Whether the file of `status` is excluded, whatever its name."""
        return (status.st_dev, status.st_ino) in self.inodes


def copy_folder(fd: int, folder: str, target: str, excluded: Excluded) -> None:
    """Copy the contents of the directory `fd`, open or with O_PATH, into the directory `target`.

    Messages and `excluded` use `folder` as its path. Copies are files (sparse, reflinked where
    possible, with their mtimes), directories, and symlinks (never followed), with their modes, and
    for root with their owners. Everything but `target` itself is synced. Not copied: `excluded`
    files, staging names, FIFOs, sockets, devices, and extended attributes such as ACLs. Raises
    DiffMergeError, also if a subdirectory is replaced meanwhile.
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
                label = os.path.join(folder, path)
                if is_left_out(name) or label in excluded.paths:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    with failures(place):
                        os.mkdir(place, 0o700)
                    waiting.append((path, place, status))
                elif stat.S_ISLNK(status.st_mode):
                    _copy_symlink(here, name, place, status, label)
                elif stat.S_ISREG(status.st_mode) and not excluded.has(status):
                    copy_file(here, name, place, label)
    # Innermost first: a directory's final mode may forbid its owner to write in it.
    for place, status, mode in reversed(finished):
        set_owner_and_mode(place, status, mode)
        with failures(place):
            sync_directory(place)


def copy_file(root: Root, path: str, target: str, label: str | None = None) -> None:
    """Copy the regular file `path`, beneath `root`, to `target`, as `copy_folder` does.

    Messages use `label` as its path, by default `path`.
    """
    with failures(label or path), beneath.closing_fd(beneath.open_regular(root, path)) as fd:
        status = os.fstat(fd)
        mode = copied_bits(fd, status.st_mode)
    if status.st_size == 0:
        with failures(target):
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    else:
        with closing(Layer.open(path, root, label)) as layer:
            with failures(label or path):
                status, mode = layer.status, layer.mode
            flatten(MergedView([layer]), target)
    set_owner_and_mode(target, status, mode)
    with failures(target):
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def set_owner_and_mode(path: str, status: os.stat_result, mode: int) -> None:
    """Set the mode of the file or directory `path`, and as root its owner to that of `status`.

    A symlink keeps its mode. Raises FileAccessError.
    """
    with failures(path):
        if os.geteuid() == 0:
            os.chown(path, status.st_uid, status.st_gid, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(path, mode)


def _entries(folder: int) -> Iterator[tuple[str, os.stat_result]]:
    with beneath.closing_fd(beneath.open_directory(folder)) as fd, os.scandir(fd) as entries:
        # Sorted, because the copy of a file removes the seal of its name: copy the seal later.
        for entry in sorted(entries, key=lambda entry: entry.name):
            if status := status_of(entry):
                yield entry.name, status


def _copy_symlink(folder: int, name: str, target: str, status: os.stat_result, label: str) -> None:
    with failures(label), beneath.closing_fd(beneath.open_handle(folder, name)) as handle:
        # The handle is of the symlink itself (readlinkat(2)).
        leads_to = os.readlink("", dir_fd=handle)
    with failures(target):
        os.symlink(leads_to, target)
    set_owner_and_mode(target, status, 0)
