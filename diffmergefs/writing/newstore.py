"""A forkd store that is being written, tag by tag, parents first."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import closing, suppress
from dataclasses import dataclass

from diffmergefs.analysis.compare import bytes_to_compare, require_equal
from diffmergefs.core import beneath
from diffmergefs.core.beneath import Root
from diffmergefs.core.errors import LayerChangedError
from diffmergefs.core.failures import failures
from diffmergefs.core.identity import FileKey, copied_bits
from diffmergefs.core.layer import Layer
from diffmergefs.core.progress import Progress
from diffmergefs.core.view import MergedView
from diffmergefs.opening.pins import content_hash
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars.bmap import SEAL_SUFFIX
from diffmergefs.stores.catalog import Catalog
from diffmergefs.stores.snapshot import (
    DOCUMENT,
    MAX_DOCUMENT,
    Snapshot,
    parse_document,
    read_with_status,
)
from diffmergefs.writing.companions import Kept, copy_file, copy_folder, take_over
from diffmergefs.writing.flatten import flatten
from diffmergefs.writing.newdiff import NewDiff
from diffmergefs.writing.output import OutputDirectory, sync_directory
from diffmergefs.writing.rediff import rediff


@dataclass(frozen=True)
class NewSnapshot:
    """A snapshot of the new store.

    `done` is 'base' or 'diff' for a memory file that was taken over as it was, 'rediffed' for a
    dense link that is a true diff now, and 'dense' for one that differs from its parent in every
    page, and so stays dense. `data_before` and `data_bytes` are the bytes of data in the memory
    file, in the old store and in the new one.
    """

    tag: str
    parent: str | None
    done: str
    size: int
    data_before: int
    data_bytes: int


@dataclass(frozen=True)
class NewStore:
    """What was written: the `snapshots`, parents first, in the directory `output`.

    `left_out` are those of the old store that are broken: by tag, the reason. `overridden` has a
    line for each check that failed and that the policy overrode.
    """

    output: str
    snapshots: tuple[NewSnapshot, ...]
    left_out: dict[str, str]
    overridden: tuple[str, ...]

    @property
    def data_before(self) -> int:
        """The bytes of data of these snapshots' memory files in the old store."""
        return sum(snapshot.data_before for snapshot in self.snapshots)

    @property
    def data_bytes(self) -> int:
        """The bytes of data of the memory files in the new store."""
        return sum(snapshot.data_bytes for snapshot in self.snapshots)


@dataclass(frozen=True)
class Link:
    """A snapshot to take over: its chain's `layers`, base first, and whether it is dense."""

    snapshot: Snapshot
    layers: tuple[Layer, ...]
    dense: bool

    @property
    def tag(self) -> str:
        return self.snapshot.tag

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
class WriteOptions:
    """How memory files are written; see `rediff`. With `seal` each gets a seal."""

    policy: TrustPolicy
    verify: bool = False
    seal: bool = False
    jobs: int = 1


class StoreWriter:
    """Writes snapshots into the new store's `directory`, each parent before its children.

    `root` and `catalog` are the old store's. `parents` are the tags whose new memory files are to
    be hashed, for the pins of their children.
    """

    def __init__(
        self,
        directory: OutputDirectory,
        root: Root,
        catalog: Catalog,
        parents: Collection[str],
        progress: Progress,
    ) -> None:
        self._directory = directory
        self._root = root
        self._catalog = catalog
        self._parents = parents
        self._progress = progress
        self._hashes: dict[str, str] = {}

    def write(self, link: Link, options: WriteOptions) -> NewSnapshot:
        """Write the tag's directory: its memory file, what stands beside it, its document.

        All is synced. Raises like `StoreRediff.write`.
        """
        folder = os.path.join(self._directory.target, link.tag)
        with failures(folder):
            os.mkdir(folder, 0o700)
        path = os.path.join(folder, os.path.basename(link.layer.path))
        done = self._write_memory(link, path, options)
        if link.tag in self._parents:
            with closing(Layer.open(path)) as layer, failures(path):
                self._hashes[link.tag] = content_hash(layer, self._progress)
        # All of it from the directory that was judged, whose mode the new one takes: one that comes
        # to stand at its path meanwhile may let in others.
        with failures(link.tag), beneath.passing(self._root, link.tag) as source:
            status = os.fstat(source)
            mode = copied_bits(f"/proc/self/fd/{source}", status.st_mode)
            self._copy_companions(source, link.snapshot, folder)
            if link.snapshot.document is not None:
                self._write_document(source, link.snapshot, folder)
            if os.path.dirname(link.snapshot.layer.path) == link.tag:
                _mode_there(source, link.snapshot.layer.path, link.layer.status)
        take_over(folder, status, mode)
        with failures(folder):
            sync_directory(folder)
        return done

    def _write_memory(self, link: Link, path: str, options: WriteOptions) -> NewSnapshot:
        own = MergedView([link.layer])
        seal = options.seal or bool(link.layer.records)
        if link.snapshot.parent is None:
            flatten(own, path, verify=options.verify, seal=seal, progress=self._progress)
            done, data = "base", link.layer.extents.data_bytes
        elif link.dense:
            result = rediff(
                MergedView(link.layers[:-1]),
                own,
                path,
                verify=options.verify,
                seal=seal,
                jobs=options.jobs,
                policy=options.policy,
                progress=self._progress,
            )
            done = "dense" if result.written.dense else "rediffed"
            data = result.written.data_bytes
        else:
            data = _copy_diff(own, path, seal, options, self._progress)
            done = "diff"
        with failures(path):
            mode = link.layer.mode
        take_over(path, link.layer.status, mode)
        if seal:
            take_over(path + SEAL_SUFFIX, link.layer.status, mode & 0o666)
        return NewSnapshot(
            tag=link.tag,
            parent=link.snapshot.parent,
            done=done,
            size=link.layer.size,
            data_before=link.layer.extents.data_bytes,
            data_bytes=data,
        )

    def _copy_companions(self, source: int, snapshot: Snapshot, folder: str) -> None:
        hidden = self._catalog.hidden | {f"{snapshot.tag}/{DOCUMENT}"}
        copy_folder(source, snapshot.tag, folder, Kept(hidden, self._catalog.layer_files))
        for name, path in snapshot.files.items():
            if path != f"{snapshot.tag}/{name}":  # it lies in another directory
                copy_file(self._root, path, os.path.join(folder, name))

    def _write_document(self, source: int, snapshot: Snapshot, folder: str) -> None:
        place = os.path.join(self._directory.final, snapshot.tag)
        path = f"{snapshot.tag}/{DOCUMENT}"
        text, status = read_with_status(self._root, path, MAX_DOCUMENT)
        mode = _mode_there(source, path, status)
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
        take_over(path, status, mode)


def _mode_there(folder: int, path: str, status: os.stat_result) -> int:
    # The mode for a copy of the file of `status`. Raises LayerChangedError unless that lies in the
    # directory, by its name.
    name = os.path.basename(path)
    with suppress(FileNotFoundError):
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            if os.path.samestat(os.fstat(handle), status):
                return copied_bits(f"/proc/self/fd/{handle}", status.st_mode)
        finally:
            os.close(handle)
    raise LayerChangedError(f"{path}: another file stands there by now; try again")


def _copy_diff(
    own: MergedView, path: str, seal: bool, options: WriteOptions, progress: Progress
) -> int:
    def check(layer: Layer) -> None:
        if options.verify:
            require_equal(MergedView([layer]), own, path)

    with NewDiff(path, own, policy=options.policy) as diff:
        diff.put(own.layers[0].extents, progress)
        return diff.publish(seal=seal, check=check).data_bytes
