"""The store that a mount serves: a directory that is looked over repeatedly, opened on demand."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from diffmergefs.core import beneath
from diffmergefs.core.errors import (
    DiffMergeError,
    FileAccessError,
    LayerChangedError,
    WriterError,
    one_line,
)
from diffmergefs.core.identity import FileKey
from diffmergefs.core.layer import Layer
from diffmergefs.core.singleflight import SingleFlight
from diffmergefs.fuse.access import named_folders
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.fuse.tags import Answers, Keys, Look, TagState, states_after
from diffmergefs.opening.content import Parents
from diffmergefs.opening.filled import Hint
from diffmergefs.opening.images import must_read_pages, open_snapshot, read_pages
from diffmergefs.opening.opener import LayerPool
from diffmergefs.opening.pins import Hashes, require_pin
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars.verified import Remembered
from diffmergefs.stores.catalog import Catalog, read_catalog
from diffmergefs.stores.reader import open_source
from diffmergefs.stores.snapshot import Snapshot, StoredFile
from diffmergefs.stores.watch import HashQueue, Watch
from diffmergefs.system.mounttable import FILESYSTEM_TYPE, mount_of

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.6


class Store:
    """The snapshots of the directory `root`, as they may be served now.

    `layout` and `suffix` are those of `read_catalog`. Methods that touch files block, so call them
    in worker threads. All are safe for several threads. `close()` closes `fd`, and so does the end
    of the last reference. Nothing is ever written beneath `root`: the policy's state directory
    remembers what was verified.
    """

    def __init__(
        self,
        root: str,
        policy: TrustPolicy,
        *,
        layout: str | None = None,
        suffix: str | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """Open the directory; raises FileAccessError."""
        self.root = os.path.abspath(root)
        self.fd = open_source(root)
        # At the end of the process the kernel closes it, even if the storage hangs.
        self._close = weakref.finalize(self, os.close, self.fd)
        self._close.atexit = False
        self._layout = layout
        self._suffix = suffix
        self._policy = policy
        self._clock = clock
        self.roots = beneath.AllowedRoots(self.fd, policy.allow_outside)
        self._pool = LayerPool(self.roots, policy)
        self._hashes = Hashes(Remembered(policy.state_dir), anew=policy.anew)
        self._replacements = HashQueue(lambda file: self._hashes.of(self._pool.layer(file)))
        self._watch = Watch(self._replacements.ask)
        self._right: set[tuple[FileKey, str | None]] = set()  # parents and their recorded hashes
        self._opening: SingleFlight[OpenImage] = SingleFlight()
        #: The result of the last look.
        self.seen = Look(Catalog(self.root, layout or "forkd", {}))
        self._lock = threading.Lock()
        self._hinted: set[Hint] = set()  # logged once per layer, however many images have it
        #: Called with each image before it is served, and what its view depends on.
        self.keep: Callable[[OpenImage, Keys], None] = lambda image, keys: None
        #: Called with what `remember` needs, which can be pickled, before anything is served by a
        #: look that saw news.
        self.saved: Callable[[object], None] | None = None
        #: Called with `fd` once it is another directory.
        self.moved: Callable[[int], None] = lambda fd: None
        self._last: object = None

    def close(self) -> None:
        """Close the directory. Images that are open stay open. Do nothing else with it later."""
        self._close()

    def look(self) -> set[str]:
        """Look over the directory by metadata, and update `seen`.

        Returns the tags that must settle before they can be served. It drops images whose chain
        changed or whose layers are tainted, and refusals that have passed (the writer has gone, or
        what made a hole look like data): the next `open` makes new ones. A directory that was
        renamed is followed until another one is at `root`. Raises DiffMergeError if the directory
        as a whole cannot be read. Then the served images stay, except those of a deleted directory.
        """
        self._follow_root()
        catalog = read_catalog(
            self.root,
            self._layout,
            self._suffix,
            self.fd,
            self._policy,
        )
        catalog.recall(self.seen.catalog)
        chains, unsettled = self._watch.judge(catalog, self._clock())
        named = named_folders(self.roots, [links[-1] for links in chains.values()])
        states = states_after(self.seen.tags, catalog, chains, unsettled)
        seen = Look(catalog, states, self._watch.device_state, named)
        self._save(seen)
        self.seen = seen
        self._retry_refused()
        for state in states.values():
            if (image := state.image) is not None:
                renewed = state.renewed(image, self.roots)
                if renewed is not None and renewed is not image:
                    self.keep(renewed, state.keys)
                with self._lock:
                    if state.image is image:
                        state.image = renewed
        self._forget(catalog)
        return unsettled

    def _save(self, seen: Look) -> None:
        if self.saved is None:
            return
        memory = seen, self._watch.memory
        if memory != self._last:
            self.saved(memory)
            self._last = memory

    def remember(self, memory: Any) -> None:
        """Go on from what another process saw of this directory, and gave to its `saved`."""
        self._last = self.seen, self._watch.memory = memory

    def adopt(self, tag: str, keys: Keys, image: OpenImage) -> None:
        """Serve this image of a tag, if its chain still is the one that `keep` was called with."""
        state = self.seen.tags.get(tag)
        if state is not None and state.keys == keys:
            state.image = image

    def _retry_refused(self) -> None:
        # Some refusals do not depend on the files, so no file shows when they have passed.
        answers: Answers = {}
        for state in self.seen.tags.values():
            refusal = state.refusal
            if refusal is None or not refusal.is_passing:
                continue
            is_writer = isinstance(refusal, WriterError)
            ask = self._pool.has_writer if is_writer else self._pool.has_cached_hole
            if not state.holds_for_some(ask, answers):
                what = "open for writing" if is_writer else "with holes that look like data"
                log.info("%s: no layer of it is known to be %s any more", one_line(state.tag), what)
                state.refusal = None

    def _follow_root(self) -> None:
        # The directory may have been deleted and made again, or be a filesystem mounted anew.
        here, there = _status(self.fd), _status(self.root)
        if there is None or not stat.S_ISDIR(there.st_mode):
            if here is not None and here.st_nlink == 0:
                # Nothing is served, but the next look logs only what changed.
                logged = {tag: state.logged for tag, state in self.seen.tags.items()}
                states = {tag: TagState(tag, [], logged=text) for tag, text in logged.items()}
                self.seen = replace(self.seen, tags=states)
                raise FileAccessError(
                    f"{self.root}: was deleted; it is served again once it is back"
                )
            return
        if here is not None and os.path.samestat(here, there):
            return
        with beneath.closing_fd(open_source(self.root)) as fd:
            if (mount := mount_of(fd)) and mount.kind == FILESYSTEM_TYPE:
                raise FileAccessError(f"{self.root}: a diffmergefs was mounted over it")
            # In one step for all threads that use the number.
            os.dup2(fd, self.fd, inheritable=False)
            self.moved(self.fd)
        log.warning("%s: another directory is at this path now, and is served instead", self.root)

    def _forget(self, catalog: Catalog) -> None:
        # Facts about files that are gone would grow as long as the mount lives.
        files = [s.memory for s in catalog.snapshots.values() if s.memory]
        present, paths = {file.key for file in files}, {file.path for file in files}
        with self._lock:
            self._right = {pin for pin in self._right if pin[0] in present}
            self._hinted = {hint for hint in self._hinted if hint.path in paths}
        self._replacements.forget_all_but(present)
        self._pool.forget_all_but(present)

    def tags(self) -> list[str]:
        """The tags that are served now."""
        return [tag for tag, state in self.seen.tags.items() if state.links]

    def chain(self, tag: str) -> Sequence[Snapshot] | None:
        """The snapshots that make up `tag`, base first, or None if it is not served now."""
        state = self.seen.tags.get(tag)
        return state.links or None if state else None

    def total_bytes(self) -> int:
        """The sum of the logical sizes of all images that are served."""
        states = self.seen.tags.values()
        return sum(state.links[-1].layer.key.size for state in states if state.links)

    def opened(self, tag: str) -> OpenImage | None:
        """The image of `tag` if its present chain is open. Never blocks.

        Raises the DiffMergeError with which its layers were refused, if they were.
        """
        state = self.seen.tags.get(tag)
        return None if state is None else state.opened()

    def tag_of(self, image: OpenImage) -> str | None:
        """The tag under which this very image is served now, if any. Never blocks."""
        states = self.seen.tags.values()
        return next((state.tag for state in states if state.image is image), None)

    def open_layer(self, file: StoredFile) -> Layer:
        """Open, sync and walk one layer. The caller holds it until `open` has used it."""
        return self._pool.layer(file)

    def unread(self, layers: Sequence[Layer]) -> list[int]:
        """The numbers of the layers of a chain whose pages `open` must read to judge them.

        Blocks, but reads none of them.
        """
        found, parents = [], Parents()
        for number, layer in enumerate(layers):
            is_diff = number > 0 and layer.size == layers[0].size
            if is_diff and must_read_pages(parents, layer, self._policy, self._pool.verdicts):
                found.append(number)
            parents.add(layer)
        return found

    def read(self, layers: Sequence[Layer]) -> None:
        """Read what must be read of the newest of these layers. `open` then knows the result.

        Blocks for a read of 16 MiB, and more for a diff on overlayfs. Raises DiffMergeError.
        """
        *below, layer = layers
        read_pages(Parents(below), layer, self._policy, self._pool.verdicts)

    def pins(self, tag: str) -> list[tuple[Snapshot, Snapshot]]:
        """The parents that `open` must hash for `tag`, each with the link that records its hash.

        Leaves out those whose hash was found right before. Empty if the policy's `verify` is 'no',
        or if the tag is not served. Never blocks.
        """
        return [
            (parent, link)
            for parent, link in self._pins(self.chain(tag) or [])
            if (parent.layer.key, link.parent_hash) not in self._right
        ]

    def _pins(self, links: Sequence[Snapshot]) -> list[tuple[Snapshot, Snapshot]]:
        if not self._policy.compares:
            return []
        return [pair for pair in itertools.pairwise(links) if pair[1].parent_hash is not None]

    def require_pin(self, parent: Snapshot, link: Snapshot) -> None:
        """Hash `parent` if that was not done, and raise PinError if `link` records another hash.

        Blocks for as long as the whole file takes. `open` does it too. Call this before in another
        thread, so that a hash does not occupy a thread that others need.
        """
        require_pin(self._pool.layer(parent.layer), link, self._hashes)
        with self._lock:
            self._right.add((parent.layer.key, link.parent_hash))

    def open(self, tag: str) -> OpenImage:
        """The image of `tag`. Opens, walks and merges its chain if that was not done yet.

        Compares parents with the hashes that their children record: see `pins`. Raises
        FileAccessError if the tag is not served, and DiffMergeError if a layer is refused. A
        refusal holds until the chain changes, or until a look finds that it has passed. The log
        gets the reason once. The errno is ENOENT if the tag is not served or a layer is gone, and
        EBUSY if a layer changed or was replaced since the look: the next look deals with it.
        """
        state = self.seen.tags.get(tag)
        if state is None or not state.links:
            gone = FileAccessError(f"{tag}: no such snapshot is served")
            gone.errno = errno.ENOENT
            raise gone
        # One image has one inode number.
        return self._opening.do(state, lambda: self._open(state))

    def _open(self, state: TagState) -> OpenImage:
        if known := state.opened():
            return known
        tag, links = state.tag, state.links
        try:
            opened = open_snapshot(links, self._pool, self._policy)
            for parent, link in self._pins(links):
                self.require_pin(parent, link)
            name, access = state.name_and_access(opened.view, self.roots)
            image = OpenImage.of(opened.view, name, access, tag)
        except (OSError, FileAccessError, LayerChangedError) as error:
            raise state.complain(error) from error
        except DiffMergeError as error:
            state.refusal = error.anew()
            log.warning("%s: its memory file is not shown: %s", tag, state.refusal)
            raise
        self.keep(image, state.keys)
        with self._lock:
            news = [hint for hint in opened.hints if hint not in self._hinted]
            self._hinted.update(news)
            state.image, state.complaint = image, ""
        for line in (*opened.overridden, *news):
            log.warning("%s", line)
        return image


def wait_until_stable(store: Store) -> None:
    """Scan the store until fresh snapshots have been seen twice, so that the mount shows them."""
    if store.look():
        time.sleep(LOOK_SECONDS)
        store.look()


def _status(file: int | str) -> os.stat_result | None:
    try:
        return os.stat(file)
    except OSError:
        return None
