"""`rediff --store`: a forkd store with true diffs in place of its dense links, in a new directory.

forkd's daemon leaves links that it has merged already: complete images in spite of their parent.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from diffmergefs.core.errors import (
    BrokenChainError,
    DiffMergeError,
    LayerChangedError,
    OutputRefusedError,
)
from diffmergefs.core.failures import failures
from diffmergefs.core.identity import copied_bits
from diffmergefs.core.progress import Progress, ignore_progress
from diffmergefs.opening.images import open_snapshot
from diffmergefs.opening.opener import opened_store
from diffmergefs.opening.pins import Hashes, require_pin
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars.verified import Remembered
from diffmergefs.stores.catalog import Catalog, read_catalog
from diffmergefs.stores.snapshot import DOCUMENT
from diffmergefs.writing.companions import take_over
from diffmergefs.writing.newstore import Link, NewStore, StoreWriter, WriteOptions
from diffmergefs.writing.output import OutputDirectory


class StoreRediff:
    """A forkd store, opened and judged, of which `write` makes a new one.

    `source` is the directory; all its snapshots are opened and judged as by a mount, but for pins,
    which `write` compares. One that is broken is refused (BrokenChainError), or with `skip_broken`
    left out, and so are its descendants. As a context manager it closes the layers. Raises
    FileAccessError and BrokenChainError where the directory is no forkd store.
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
                " directory in which the tags lie"
            )
        self.left_out: dict[str, str] = {}
        self._overridden: dict[str, None] = {}
        self._links: dict[str, Link] = {}
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
        for link in self._links.values():
            link.layer.close()

    @property
    def total_bytes(self) -> int:
        """How many bytes `write` copies, compares and hashes."""
        links = self._links.values()
        pinned = [link for link in links if link.snapshot.parent_hash]
        parents = {link.snapshot.parent for link in links if link.snapshot.parent}
        hashed = [self._links[tag] for tag in parents]
        hashed_bytes = sum(link.layer.size for link in [*pinned, *hashed])
        return hashed_bytes + sum(link.work_bytes for link in links)

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

        Each dense link becomes the diff between its parent's image and its own (`rediff`, whose
        options `verify` and `jobs` are). Bases, diffs and the other files of each tag are copied,
        or reflinked (`companions.copy_folder`). Each `snapshot.json` is written anew: `memory` and
        `vmstate` point into `output`, and `parent_content_hash` is the sha256 of the parent's new
        memory file, whether one was recorded before or not; one that was recorded must be right.
        Other fields are passed on. A memory file that had a seal, or with `seal` each, gets a new
        one. The directory gets its name when all in it is whole and synced; nothing is written to
        the old store. `progress` is given
        `total_bytes` in all.

        Raises OutputRefusedError (`output` exists, lies in the store, or is no UTF-8, which the
        documents are), BrokenChainError (a recorded hash is wrong, and nothing is to be skipped),
        LayerChangedError (also where the store changed meanwhile), and like `rediff`.
        """
        output = os.fspath(output)
        self._require_fit(output)
        with OutputDirectory(output) as directory:
            self._require_pins(progress)
            parents = {link.snapshot.parent or "" for link in self._links.values()}
            writer = StoreWriter(directory, self._pool.roots, self._catalog, parents, progress)
            options = WriteOptions(self._policy, verify=verify, seal=seal, jobs=jobs)
            done = [writer.write(link, options) for link in self._links.values()]
            self._require_unchanged()
            with failures(self.source):
                status = os.fstat(self._pool.roots.root)
                mode = copied_bits(self._pool.roots.root, status.st_mode)
            take_over(directory.target, status, mode)
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
            link = Link(links[-1], image.view.layers, image.dense)
            self._links[link.tag] = link

    def _leave_out(self, tag: str, error: DiffMergeError) -> None:
        if not self._skip_broken:
            raise BrokenChainError(
                f"{self.source}: '{tag}' is broken: {error}; mend it, or leave what is broken out"
                " with --skip-broken"
            ) from error
        self.left_out[tag] = str(error)

    def _require_pins(self, progress: Progress) -> None:
        # A new pin must not make a parent right that the old one says is wrong.
        hashes = Hashes(Remembered(self._policy.state_dir))
        for tag, link in list(self._links.items()):
            parent = link.snapshot.parent
            if parent is None:
                continue
            try:
                if parent not in self._links:
                    raise BrokenChainError(f"ancestor '{parent}' is broken")
                with failures(self._links[parent].layer.path):
                    require_pin(self._links[parent].layer, link.snapshot, hashes, progress)
            except DiffMergeError as error:
                self._leave_out(tag, error)
                del self._links[tag]

    def _require_fit(self, output: str) -> None:
        try:
            os.path.abspath(output).encode()
        except UnicodeEncodeError:
            raise OutputRefusedError(
                f"{output!a}: is no UTF-8, and {DOCUMENT} can name nothing else; choose another"
                " output"
            ) from None
        store = os.path.realpath(self.source)
        place = os.path.realpath(os.path.dirname(os.path.abspath(output)))
        if os.path.commonpath([store, place]) == store:
            raise OutputRefusedError(
                f"{output}: lies in the store itself; choose an output outside of {self.source}"
            )

    def _require_unchanged(self) -> None:
        now = self._read().snapshots
        for tag, link in self._links.items():
            if tag not in now or now[tag].state != link.snapshot.state:
                raise LayerChangedError(
                    f"{self.source}: '{tag}' changed while the store was read; nothing was written"
                    " under the output's name, try again"
                )
