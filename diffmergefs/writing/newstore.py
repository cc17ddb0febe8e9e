"""Writing a new forkd store, tag by tag, parents first, with the files beside each memory file."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from diffmergefs.analysis.compare import bytes_to_compare
from diffmergefs.core import beneath
from diffmergefs.core.beneath import Root
from diffmergefs.core.errors import LayerChangedError
from diffmergefs.core.failures import failures
from diffmergefs.core.identity import FileKey, copied_bits
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.core.workers import Progress
from diffmergefs.opening.pins import content_hash
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars.bmap import SEAL_SUFFIX
from diffmergefs.stores.catalog import Catalog
from diffmergefs.stores.snapshot import (
    DOCUMENT,
    MAX_DOCUMENT,
    Snapshot,
    is_left_out,
    parse_document,
    read_with_status,
    status_of,
)
from diffmergefs.writing.diffs import rediff, squash
from diffmergefs.writing.flatten import flatten
from diffmergefs.writing.output import OutputDirectory, sync_directory


@dataclass(frozen=True)
class NewSnapshot:
    """A snapshot of the new store.

    `done` is 'base' or 'diff' for a memory file that was copied, 'rediffed' for a dense link that
    is a true diff now, and 'dense' for one that differs from its parent in every page and so stays
    dense. `data_before` and `data_bytes` count the data of the memory file, in the old store and
    in the new one.
    """

    tag: str
    parent: str | None
    done: str
    size: int
    data_before: int
    data_bytes: int


@dataclass(frozen=True)
class OpenSnapshot:
    """An open snapshot of the old store: its chain's `layers`, base first, and if it is dense."""

    record: Snapshot
    layers: tuple[Layer, ...]
    dense: bool

    @property
    def tag(self) -> str:
        """The tag of the new snapshot."""
        return self.record.tag

    @property
    def layer(self) -> Layer:
        """Its own layer."""
        return self.layers[-1]

    @property
    def work_bytes(self) -> int:
        """How many bytes are compared or copied to write its memory file."""
        if self.dense:
            return bytes_to_compare(MergedView(self.layers[:-1]), MergedView([self.layer]))
        return self.layer.extents.data_bytes


@dataclass(frozen=True)
class StoreWriter:
    """Writes snapshots into the new store's `directory`, each parent before its children.

    `root` and `catalog` are the old store's. `parents` are the tags whose new memory files are
    hashed, because their children record the hash. The other fields say how memory files are
    written; see `rediff`. With `seal` each gets a seal.
    """

    directory: OutputDirectory
    root: Root
    catalog: Catalog
    parents: Collection[str]
    policy: TrustPolicy
    verify: bool
    seal: bool
    jobs: int
    progress: Progress
    _hashes: dict[str, str] = field(default_factory=dict)

    def write(self, old: OpenSnapshot) -> NewSnapshot:
        """Write the tag's directory: its memory file, the files beside it, and its document.

        All of it is synced. Raises like `StoreRediff.write`.
        """
        folder = os.path.join(self.directory.target, old.tag)
        with failures(folder):
            os.mkdir(folder, 0o700)
        path = os.path.join(folder, os.path.basename(old.layer.path))
        done = self._write_memory(old, path)
        if old.tag in self.parents:
            with closing(Layer.open(path)) as layer, failures(path):
                self._hashes[old.tag] = content_hash(layer, self.progress)
        # All of it comes from the directory that was judged, and so does the mode of the new one: a
        # directory that replaced it meanwhile may admit other users.
        with failures(old.tag), beneath.passing(self.root, old.tag) as source:
            status = os.fstat(source)
            mode = copied_bits(f"/proc/self/fd/{source}", status.st_mode)
            self._copy_other_files(source, old.record, folder)
            if old.record.document is not None:
                self._write_document(source, old.record, folder)
            if os.path.dirname(old.record.layer.path) == old.tag:
                _checked_mode(source, old.record.layer.path, old.layer.status)
        set_owner_and_mode(folder, status, mode)
        with failures(folder):
            sync_directory(folder)
        return done

    def _write_memory(self, old: OpenSnapshot, path: str) -> NewSnapshot:
        own = MergedView([old.layer])
        seal = self.seal or bool(old.layer.records)
        how: dict[str, Any] = {"verify": self.verify, "seal": seal, "progress": self.progress}
        before = data = old.layer.extents.data_bytes
        if old.record.parent is None:
            flatten(own, path, **how)
            done = "base"
        elif old.dense:
            parent = MergedView(old.layers[:-1])
            result = rediff(parent, own, path, jobs=self.jobs, policy=self.policy, **how)
            done = "dense" if result.written.dense else "rediffed"
            data = result.written.data_bytes
        else:
            whole, last = MergedView(old.layers), len(old.layers) - 1
            squash(whole, path, first=last, policy=self.policy, **how)
            done = "diff"
        with failures(path):
            mode = old.layer.mode
        set_owner_and_mode(path, old.layer.status, mode)
        if seal:
            set_owner_and_mode(path + SEAL_SUFFIX, old.layer.status, mode & 0o666)
        return NewSnapshot(old.tag, old.record.parent, done, old.layer.size, before, data)

    def _copy_other_files(self, source: int, snapshot: Snapshot, folder: str) -> None:
        hidden = self.catalog.hidden | {f"{snapshot.tag}/{DOCUMENT}"}
        copy_folder(source, snapshot.tag, folder, Excluded(hidden, self.catalog.layer_files))
        for name, path in snapshot.files.items():
            if path != f"{snapshot.tag}/{name}":  # in another directory
                copy_file(self.root, path, os.path.join(folder, name))

    def _write_document(self, source: int, snapshot: Snapshot, folder: str) -> None:
        place = os.path.join(self.directory.final, snapshot.tag)
        path = f"{snapshot.tag}/{DOCUMENT}"
        text, status = read_with_status(self.root, path, MAX_DOCUMENT)
        mode = _checked_mode(source, path, status)
        read = snapshot.document_status
        if read is None or FileKey.of(status) != FileKey.of(read):
            raise LayerChangedError(f"{path}: changed since its directory was read; try again")
        document = parse_document(text, path)
        document["memory"] = os.path.join(place, os.path.basename(snapshot.layer.path))
        if snapshot.vmstate is not None:
            document["vmstate"] = os.path.join(place, snapshot.vmstate)
        if snapshot.parent is not None:
            document["parent_content_hash"] = self._hashes[snapshot.parent]
        path = os.path.join(folder, DOCUMENT)
        with failures(path), open(path, "xb") as file:
            file.write(json.dumps(document, indent=2).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        set_owner_and_mode(path, status, mode)


def _checked_mode(folder: int, path: str, status: os.stat_result) -> int:
    # The mode for a copy of the file `path`. Raises LayerChangedError if the entry of its name in
    # `folder` is not the file of `status`.
    name = os.path.basename(path)
    with (
        suppress(FileNotFoundError),
        beneath.closing_fd(beneath.open_handle(folder, name)) as handle,
    ):
        if os.path.samestat(os.fstat(handle), status):
            return copied_bits(f"/proc/self/fd/{handle}", status.st_mode)
    raise LayerChangedError(f"{path}: was replaced meanwhile; try again")


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
