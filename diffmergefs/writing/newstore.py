"""Writing a new forkd store, tag by tag, parents first."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import closing, suppress
from dataclasses import dataclass, field

from diffmergefs.analysis.compare import bytes_to_compare, require_equal
from diffmergefs.core import beneath
from diffmergefs.core.beneath import Root
from diffmergefs.core.errors import LayerChangedError, failures
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
    parse_document,
    read_with_status,
)
from diffmergefs.writing.companions import Excluded, copy_file, copy_folder, set_owner_and_mode
from diffmergefs.writing.diffs import rediff
from diffmergefs.writing.flatten import flatten
from diffmergefs.writing.newdiff import NewDiff
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
class NewStore:
    """The `snapshots`, parents first, in the new directory `output`.

    `left_out` has the reason for each broken tag of the old store. `overridden` has a line for each
    failed check that the policy overrode.
    """

    output: str
    snapshots: tuple[NewSnapshot, ...]
    left_out: dict[str, str]
    overridden: tuple[str, ...]

    @property
    def data_before(self) -> int:
        """The data in these snapshots' memory files in the old store."""
        return sum(snapshot.data_before for snapshot in self.snapshots)

    @property
    def data_bytes(self) -> int:
        """The data in the memory files of the new store."""
        return sum(snapshot.data_bytes for snapshot in self.snapshots)


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
            self._copy_companions(source, old.record, folder)
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
        if old.record.parent is None:
            flatten(own, path, verify=self.verify, seal=seal, progress=self.progress)
            done, data = "base", old.layer.extents.data_bytes
        elif old.dense:
            result = rediff(
                MergedView(old.layers[:-1]),
                own,
                path,
                verify=self.verify,
                seal=seal,
                jobs=self.jobs,
                policy=self.policy,
                progress=self.progress,
            )
            done = "dense" if result.written.dense else "rediffed"
            data = result.written.data_bytes
        else:
            data = self._copy_diff(own, path, seal)
            done = "diff"
        with failures(path):
            mode = old.layer.mode
        set_owner_and_mode(path, old.layer.status, mode)
        if seal:
            set_owner_and_mode(path + SEAL_SUFFIX, old.layer.status, mode & 0o666)
        return NewSnapshot(
            tag=old.tag,
            parent=old.record.parent,
            done=done,
            size=old.layer.size,
            data_before=old.layer.extents.data_bytes,
            data_bytes=data,
        )

    def _copy_diff(self, own: MergedView, path: str, seal: bool) -> int:
        def check(layer: Layer) -> None:
            if self.verify:
                require_equal(MergedView([layer]), own, path)

        with NewDiff(path, own, policy=self.policy) as diff:
            diff.put(own.layers[0].extents, self.progress)
            return diff.publish(seal=seal, check=check).data_bytes

    def _copy_companions(self, source: int, snapshot: Snapshot, folder: str) -> None:
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
