"""`rediff --store`: copy a forkd store, and make its dense links true diffs.

A dense link is a complete image in spite of its parent: forkd's daemon has merged it already.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass

from diffmergefs.core.errors import (
    BrokenChainError,
    DiffMergeError,
    LayerChangedError,
    OutputRefusedError,
)
from diffmergefs.core.failures import failures
from diffmergefs.core.identity import copied_bits
from diffmergefs.core.workers import Progress, ignore_progress
from diffmergefs.opening.images import open_snapshot
from diffmergefs.opening.opener import opened_store
from diffmergefs.opening.pins import Hashes, require_pin
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars.verified import Remembered
from diffmergefs.stores.catalog import Catalog, read_catalog
from diffmergefs.stores.snapshot import DOCUMENT
from diffmergefs.writing.newstore import NewSnapshot, OpenSnapshot, StoreWriter, set_owner_and_mode
from diffmergefs.writing.output import OutputDirectory


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


class StoreRediff:
    """The open forkd store in the directory `source`, from which `write` makes a new one.

    All snapshots are opened and checked as by a mount, except for pins, which `write` compares. A
    broken snapshot raises BrokenChainError. With `skip_broken` it is left out, and so are its
    descendants. As a context manager it closes the layers. Raises FileAccessError, and
    BrokenChainError if the directory is not a forkd store.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        skip_broken: bool = False,
        policy: TrustPolicy | None = None,
    ) -> None:
        self.source = os.fspath(source)
        self._policy = policy or TrustPolicy()
        self._skip_broken = skip_broken
        self._catalog = self._read()
        if not self._catalog.snapshots:
            raise BrokenChainError(
                f"{self.source}: holds no snapshot of a forkd store (TAG/{DOCUMENT}); name the"
                " directory that contains the tags"
            )
        self.left_out: dict[str, str] = {}
        self._overridden: dict[str, None] = {}
        self._snapshots: dict[str, OpenSnapshot] = {}
        with ExitStack() as stack:
            self._pool = stack.enter_context(opened_store(self.source, self._policy))
            stack.callback(self._close_layers)
            self._judge()
            self._open = stack.pop_all()

    def __enter__(self) -> StoreRediff:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the layers and the directory."""
        self._open.close()

    def _close_layers(self) -> None:
        for snapshot in self._snapshots.values():
            snapshot.layer.close()

    @property
    def total_bytes(self) -> int:
        """How many bytes `write` copies, compares and hashes."""
        snapshots = self._snapshots.values()
        pinned = [snapshot for snapshot in snapshots if snapshot.record.parent_hash]
        parents = {snapshot.record.parent for snapshot in snapshots if snapshot.record.parent}
        hashed = [self._snapshots[tag] for tag in parents]
        hashed_bytes = sum(snapshot.layer.size for snapshot in [*pinned, *hashed])
        return hashed_bytes + sum(snapshot.work_bytes for snapshot in snapshots)

    def write(
        self,
        output: str | os.PathLike[str],
        *,
        verify: bool = False,
        seal: bool = False,
        jobs: int = 1,
        progress: Progress = ignore_progress,
    ) -> NewStore:
        """Write the new store to the directory `output`, which does not exist yet.

        Each dense link becomes the diff between its parent's image and its own: see `rediff`, also
        for `verify` and `jobs`. Bases, diffs and the other files of each tag are copied, or
        reflinked (`newstore.copy_folder`). Each `snapshot.json` is copied with new values:
        `memory` and `vmstate` point into `output`, and `parent_content_hash` is the sha256 of the
        parent's new memory file, even if none was recorded; a recorded one must be right. A memory
        file gets a seal if it had one, and always with `seal`. The directory gets its name when
        everything in it is whole and synced. Nothing is written to the old store. `progress` is
        given `total_bytes` in all.

        Raises OutputRefusedError (`output` exists, lies in the store, or is not valid UTF-8, which
        the documents require), BrokenChainError (a recorded hash is wrong, without `skip_broken`),
        LayerChangedError (also if the store changed meanwhile), and what `rediff` raises.
        """
        output = os.fspath(output)
        self._require_fit(output)
        with OutputDirectory(output) as directory:
            self._require_pins(progress)
            parents = {snapshot.record.parent or "" for snapshot in self._snapshots.values()}
            writer = StoreWriter(
                directory,
                self._pool.roots,
                self._catalog,
                parents,
                self._policy,
                verify=verify,
                seal=seal,
                jobs=jobs,
                progress=progress,
            )
            done = [writer.write(snapshot) for snapshot in self._snapshots.values()]
            self._require_unchanged()
            with failures(self.source):
                status = os.fstat(self._pool.roots.root)
                mode = copied_bits(self._pool.roots.root, status.st_mode)
            set_owner_and_mode(directory.target, status, mode)
            directory.publish(mode)
        return NewStore(output, tuple(done), self.left_out, tuple(self._overridden))

    def _read(self) -> Catalog:
        return read_catalog(self.source, "forkd", options=self._policy)

    def _judge(self) -> None:
        chains = []
        for tag in sorted(self._catalog.snapshots):
            try:
                chains.append(self._catalog.chain(tag))
            except DiffMergeError as error:
                self._leave_out(tag, error)
        for links in sorted(chains, key=len):
            try:
                with failures(self.source):
                    image = open_snapshot(links, self._pool, self._policy)
            except DiffMergeError as error:
                self._leave_out(links[-1].tag, error)
                continue
            self._overridden |= dict.fromkeys(image.overridden)
            snapshot = OpenSnapshot(links[-1], image.view.layers, image.dense)
            self._snapshots[snapshot.tag] = snapshot

    def _leave_out(self, tag: str, error: DiffMergeError) -> None:
        if not self._skip_broken:
            raise BrokenChainError(
                f"{self.source}: '{tag}' is broken: {error}; mend it, or leave broken snapshots out"
                " with --skip-broken"
            ) from error
        self.left_out[tag] = str(error)

    def _require_pins(self, progress: Progress) -> None:
        # Otherwise a new pin would hide that the parent is not the one of the old pin.
        hashes = Hashes(Remembered(self._policy.state_dir))
        for tag, snapshot in list(self._snapshots.items()):
            parent = snapshot.record.parent
            if parent is None:
                continue
            try:
                if parent not in self._snapshots:
                    raise BrokenChainError(f"ancestor '{parent}' is broken")
                with failures(self._snapshots[parent].layer.path):
                    require_pin(self._snapshots[parent].layer, snapshot.record, hashes, progress)
            except DiffMergeError as error:
                self._leave_out(tag, error)
                del self._snapshots[tag]

    def _require_fit(self, output: str) -> None:
        try:
            os.path.abspath(output).encode()
        except UnicodeEncodeError:
            raise OutputRefusedError(
                f"{output!a}: is not valid UTF-8, which {DOCUMENT} requires; choose another output"
            ) from None
        store = os.path.realpath(self.source)
        place = os.path.realpath(os.path.dirname(os.path.abspath(output)))
        if os.path.commonpath([store, place]) == store:
            raise OutputRefusedError(
                f"{output}: lies in the store itself; choose an output outside {self.source}"
            )

    def _require_unchanged(self) -> None:
        now = self._read().snapshots
        for tag, snapshot in self._snapshots.items():
            if tag not in now or now[tag].state != snapshot.record.state:
                raise LayerChangedError(
                    f"{self.source}: '{tag}' changed while the store was read, so no output was"
                    " published; try again"
                )
