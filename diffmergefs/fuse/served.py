"""A directory of snapshots that is being served: looked over again and again, opened on demand."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

from diffmergefs.core import beneath
from diffmergefs.core.errors import (
    DiffMergeError,
    FileAccessError,
    LayerChangedError,
    WriterError,
    one_line,
)
from diffmergefs.core.identity import FileKey, FileVersion
from diffmergefs.core.layer import Layer
from diffmergefs.core.singleflight import SingleFlight
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.access import Access, Folder, view_access
from diffmergefs.fuse.hashqueue import HashQueue
from diffmergefs.fuse.image import OpenImage
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
from diffmergefs.stores.watch import Watch
from diffmergefs.system.mountinfo import mount_of
from diffmergefs.system.mountpoint import FILESYSTEM_TYPE

log = logging.getLogger(__name__)

# What the verdict on a chain, and its view, are good for: for each layer its content, and the
# hash that its parent must have.
# Which layers, by which records, over parents of which recorded hashes; and what makes the lowest a
# doubtful base.
Keys = list[tuple[FileKey, frozenset[tuple[str, FileKey]], str | None, str | None]]

# What was asked of a layer's file, and the answer.
Question = Callable[[StoredFile], bool]
Answers = dict[tuple[Question, FileKey], bool]


def _keys_of(links: Sequence[Snapshot]) -> Keys:
    return [(s.layer.key, s.layer.records, s.parent_hash, s.doubt) for s in links]


class Store:
    """The snapshots of the directory `root`, as they may be shown now.

    `layout` and `suffix` are `read_catalog`'s. Every method that touches files blocks and belongs
    in a worker thread; all are safe to call from several. `close()` closes `fd`, and so does the
    end of the last reference. Nothing is ever written beneath `root`; what was verified is
    remembered in the policy's state directory.
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
        # At the end of the process the kernel closes it, whatever hangs.
        self._close = weakref.finalize(self, os.close, self.fd)
        self._close.atexit = False
        self._layout = layout
        self._suffix = suffix
        self._policy = policy
        self._clock = clock
        self.roots = beneath.AllowedRoots(self.fd, policy.allow_outside)
        self._pool = LayerPool(self.roots, policy)
        self._hashes = Hashes(Remembered(policy.state_dir), anew=policy.verify == "full")
        self._replacements = HashQueue(lambda file: self._hashes.of(self._pool.layer(file)))
        self._watch = Watch(self._replacements.ask)
        self._right: set[tuple[FileKey, str | None]] = set()  # parents and their recorded hashes
        self._opening: SingleFlight[OpenImage] = SingleFlight()
        self._lock = threading.Lock()
        self._catalog = Catalog(self.root, layout or "forkd", {})
        self._shown: dict[str, list[Snapshot]] = {}
        self._device_state: Mapping[str, FileVersion | None] = {}
        self._images: dict[str, tuple[Keys, OpenImage]] = {}
        self._refusals: dict[str, tuple[Keys, DiffMergeError]] = {}
        self._complaints: dict[str, tuple[Keys, str]] = {}
        self._said: dict[str, str] = {}
        self._hinted: set[Hint] = set()  # once a layer, however many images have it
        # The directories, below the root, of which the names of tags tell.
        self.named: frozenset[Folder] = frozenset()

    def close(self) -> None:
        """Close the directory; images that are open stay so. Do nothing else with it afterwards."""
        self._close()

    def look(self) -> set[str]:
        """Look over the directory by metadata; afterwards `tags` and `chain` speak of it.

        Gives the tags that must settle before they can be shown. Images whose chain changed or
        whose layers are tainted are forgotten, and so is a refusal that has passed (the writer has
        gone, or what made a hole look like data): the next `open` makes new ones. A directory that
        was renamed is followed, until another one stands at `root`. Raises DiffMergeError where the
        directory as a whole cannot be read; then what was shown stays, but nothing of a directory
        that was deleted.
        """
        self._follow_root()
        catalog = read_catalog(
            self.root,
            self._layout,
            self._suffix,
            self.fd,
            self._policy.allow_outside,
            allow_gaps=self._policy.allow_gaps,
        )
        catalog.recall(self._catalog)
        shown, unsettled = self._watch.judge(catalog, self._clock())
        self._say_changes(catalog, shown, unsettled)
        named = self._named(shown)
        with self._lock:
            self._catalog, self._shown, self.named = catalog, shown, named
            self._device_state = self._watch.device_state
            images = dict(self._images)
        self._forget_passed()
        current = {tag: self._renewed(tag, *known) for tag, known in images.items()}
        with self._lock:
            for tag, known in images.items():
                if self._images.get(tag) is known:
                    del self._images[tag]
                    if renewed := current[tag]:
                        self._images[tag] = renewed
        self._forget(catalog)
        return unsettled

    def _forget_passed(self) -> None:
        # No file tells when a refusal that does not depend on the files has passed: it is asked.
        with self._lock:
            refused = [(tag, known) for tag, known in self._refusals.items() if known[1].is_passing]
        answers: Answers = {}  # descendants share layers: each is asked about once
        for tag, known in refused:
            links = self.chain(tag) or []
            writers = isinstance(known[1], WriterError)
            ask = self._pool.has_writer if writers else self._pool.has_cached_hole
            if _keys_of(links) != known[0] or _holds_for_some(ask, links, answers):
                continue
            what = "open for writing" if writers else "with holes that look like data"
            log.info("%s: no layer of it is known to be %s any more", one_line(tag), what)
            with self._lock:
                if self._refusals.get(tag) is known:
                    del self._refusals[tag]

    def _follow_root(self) -> None:
        # It may have been deleted and made again, or be a filesystem that was mounted anew.
        here, there = _status(self.fd), _status(self.root)
        if there is None or not stat.S_ISDIR(there.st_mode):
            if here is not None and here.st_nlink == 0:
                with self._lock:
                    self._shown, self._images = {}, {}
                raise FileAccessError(f"{self.root}: was deleted; it is shown when it is back")
            return
        if here is not None and os.path.samestat(here, there):
            return
        fd = open_source(self.root)
        try:
            if (mount := mount_of(fd)) and mount.kind == FILESYSTEM_TYPE:
                raise FileAccessError(f"{self.root}: a diffmergefs was mounted over it")
            # In one step for all who use the number.
            os.dup2(fd, self.fd, inheritable=False)
        finally:
            os.close(fd)
        log.warning("%s: another directory stands there now, and is shown instead", self.root)

    def _forget(self, catalog: Catalog) -> None:
        # What is remembered of tags and files that are gone would grow as long as the mount lives.
        files = [s.memory for s in catalog.snapshots.values() if s.memory]
        present, paths = {file.key for file in files}, {file.path for file in files}
        with self._lock:
            for known in (self._refusals, self._complaints):
                for tag in known.keys() - self._shown.keys():
                    del known[tag]
            self._right = {pin for pin in self._right if pin[0] in present}
            self._hinted = {hint for hint in self._hinted if hint.path in paths}
        self._replacements.forget_all_but(present)
        self._pool.forget_all_but(present)

    def _named(self, shown: dict[str, list[Snapshot]]) -> frozenset[Folder]:
        # Where a tag's name is a path of several components, whoever reads it learns what the
        # directories between hold. One that cannot be looked into lets nobody list it.
        heads = [links[-1] for links in shown.values()]
        places = {os.path.dirname(head.folder or head.layer.path) for head in heads}
        found: set[Folder] = set()
        for path in {above for place in places for above in _between(place)}:
            try:
                with beneath.passing(self.roots, path) as fd:
                    found.add(Folder.of(fd))
            except OSError:
                found.add(Folder(os.geteuid(), os.getegid(), 0o700))
        return frozenset(found)

    def _renewed(self, tag: str, keys: Keys, shown: OpenImage) -> tuple[Keys, OpenImage] | None:
        layers = shown.view.layers
        links = self.chain(tag)
        if links is None or any(layer.tainted for layer in layers):
            return None
        if _keys_of(links) != keys:
            return None
        try:
            name, access = self._name_and_access(shown.view, links)
        except OSError:
            return None
        if (name, access) != (shown.name, shown.access):
            return keys, OpenImage.of(shown.view, name, access, tag)
        return keys, shown

    def _name_and_access(self, view: MergedView, links: list[Snapshot]) -> tuple[str, Access]:
        # A layer that is shared or was renamed was opened by another path than this chain's: who
        # may read the view follows from where its layers are now.
        paths = [link.layer.path for link in links]
        return os.path.basename(paths[-1]), view_access(view.layers, self.roots, paths)

    def _say_changes(
        self, catalog: Catalog, shown: dict[str, list[Snapshot]], unsettled: set[str]
    ) -> None:
        words = {tag: f"shown, {len(links)} layers" for tag, links in shown.items()}
        for tag in catalog.snapshots.keys() - shown.keys() - unsettled:
            try:
                catalog.chain(tag)
            except DiffMergeError as error:
                words[tag] = f"not shown: {error}"
        for tag, text in words.items():
            if self._said.get(tag) != text:
                level = logging.INFO if tag in shown else logging.WARNING
                log.log(level, "%s: %s", one_line(tag), text)
        for tag in self._said.keys() - words.keys() - unsettled:
            log.info("%s: gone", one_line(tag))
        self._said = words

    def tags(self) -> list[str]:
        """The tags that are shown now."""
        with self._lock:
            return list(self._shown)

    def chain(self, tag: str) -> list[Snapshot] | None:
        """The snapshots that make up `tag`, base first, or None if it is not shown now."""
        with self._lock:
            return self._shown.get(tag)

    def is_hidden(self, path: str) -> bool:
        """Whether the file `path` beneath the root is never passed through."""
        with self._lock:
            return path in self._catalog.hidden

    def is_layer(self, status: os.stat_result) -> bool:
        """Whether this is a layer's file, by whatever name: a link, or renamed since the look."""
        with self._lock:
            return (status.st_dev, status.st_ino) in self._catalog.layer_files

    def is_device_state(self, path: str) -> bool:
        """Whether the file `path` beneath the root belongs to the very memory beside it."""
        with self._lock:
            return path in self._device_state

    def require_seen(self, path: str, status: os.stat_result) -> None:
        """Raise OSError (EBUSY) for device state that may belong to another memory than is shown.

        That is a file that is not the one which the last look saw, or that was replaced since the
        look before. What belongs to no memory passes. `status` is of the file that was found at
        `path` beneath the root.
        """
        with self._lock:
            if path not in self._device_state:
                return
            seen = self._device_state[path]
        if seen != FileVersion.of(status):
            raise OSError(errno.EBUSY, "it changed since it was looked at; try again", path)

    def total_bytes(self) -> int:
        """The logical sizes of all images that are shown, added up."""
        with self._lock:
            return sum(links[-1].layer.key.size for links in self._shown.values())

    def opened(self, tag: str) -> OpenImage | None:
        """The image of `tag` if its present chain is open. Never blocks.

        Raises the DiffMergeError with which its layers were refused, if they were.
        """
        keys = self._keys(tag)
        with self._lock:
            if keys is not None and self._refusals.get(tag, (None,))[0] == keys:
                raise self._refusals[tag][1].anew()
            known_keys, known = self._images.get(tag, (None, None))
            return known if known_keys == keys else None

    def tag_of(self, shown: OpenImage) -> str | None:
        """The tag under which this very image is shown now, if it is. Never blocks."""
        with self._lock:
            return next((tag for tag, (_, known) in self._images.items() if known is shown), None)

    def open_layer(self, file: StoredFile) -> Layer:
        """Open, sync and walk one layer; the caller holds the answer until `open` has used it."""
        return self._pool.layer(file)

    def unread(self, layers: Sequence[Layer]) -> list[int]:
        """The numbers of those layers of a chain whose pages `open` must read, to judge them.

        Blocks, but reads none of them.
        """
        return [
            number
            for number, parents, layer in _each_over_its_parents(layers)
            if must_read_pages(parents, layer, self._policy, self._pool.verdicts)
        ]

    def read(self, layers: Sequence[Layer]) -> None:
        """Read what must be read of the newest of these layers; `open` then knows what it found.

        Blocks for a read of 16 MiB, and more for a diff on overlayfs. Raises DiffMergeError.
        """
        *below, layer = layers
        read_pages(Parents(below), layer, self._policy, self._pool.verdicts)

    def pins(self, tag: str) -> list[tuple[Snapshot, Snapshot]]:
        """The parents that `open` must hash for `tag`, each with the link that records its hash.

        Those that were hashed before and found right are left out. None with the policy's `verify`
        'no', and none of a tag that is not shown. Never blocks.
        """
        return [
            (parent, link)
            for parent, link in self._pins(self.chain(tag) or [])
            if (parent.layer.key, link.parent_hash) not in self._right
        ]

    def _pins(self, links: list[Snapshot]) -> list[tuple[Snapshot, Snapshot]]:
        if self._policy.verify == "no":
            return []
        return [pair for pair in itertools.pairwise(links) if pair[1].parent_hash is not None]

    def require_pin(self, parent: Snapshot, link: Snapshot) -> None:
        """Hash `parent`, unless that was done, and raise PinError if it is not what `link` records.

        Blocks for as long as the whole file takes. `open` does it too: call it before, in a
        thread of its own, so that nobody waits for a hash in a thread that others need.
        """
        require_pin(self._pool.layer(parent.layer), link, self._hashes)
        with self._lock:
            self._right.add((parent.layer.key, link.parent_hash))

    def open(self, tag: str) -> OpenImage:
        """The image of `tag`, its chain opened, walked and merged now if it was not yet.

        Parents are compared with the hashes that their children record, as `pins` says.
        Raises FileAccessError if the tag is not shown, DiffMergeError if a layer is refused: that
        holds until the chain changes, or until a look finds that it has passed. The reason goes to
        the log once.
        """
        links = self.chain(tag)
        if links is None:
            raise FileAccessError(f"{tag}: no such snapshot is shown")
        keys = _keys_of(links)
        # One image has one inode number.
        return self._opening.do((tag, *keys), lambda: self._open(tag, links, keys))

    def _open(self, tag: str, links: list[Snapshot], keys: Keys) -> OpenImage:
        if known := self.opened(tag):
            return known
        try:
            image = open_snapshot(links, self._pool, self._policy)
            for parent, link in self._pins(links):
                self.require_pin(parent, link)
            shown = OpenImage.of(image.view, *self._name_and_access(image.view, links), tag)
        except OSError as error:
            self._complain(tag, keys, str(error))
            raise FileAccessError(f"{tag}: {error.strerror}, it may have moved") from error
        except (FileAccessError, LayerChangedError) as error:
            self._complain(tag, keys, str(error))
            raise
        except DiffMergeError as error:
            log.warning("%s: its memory file is not shown: %s", tag, kept := error.anew())
            with self._lock:
                self._refusals[tag] = keys, kept
            raise
        with self._lock:
            news = [hint for hint in image.hints if hint not in self._hinted]
            self._hinted.update(news)
        for line in (*image.overridden, *news):
            log.warning("%s", line)
        with self._lock:
            self._images[tag] = keys, shown
            self._complaints.pop(tag, None)
        return shown

    def _complain(self, tag: str, keys: Keys, text: str) -> None:
        # Once, however often somebody tries.
        with self._lock:
            is_new = self._complaints.get(tag) != (keys, text)
            self._complaints[tag] = keys, text
        if is_new:
            log.warning("%s: cannot be opened now: %s", tag, text)

    def _keys(self, tag: str) -> Keys | None:
        links = self.chain(tag)
        return None if links is None else _keys_of(links)


def _between(path: str) -> Iterator[str]:
    # The directory `path` and those between it and the root; of one that lies outside, itself.
    while path:
        yield path
        path = "" if path.startswith("/") else os.path.dirname(path)


def _holds_for_some(ask: Question, links: list[Snapshot], answers: Answers) -> bool:
    # The newest first: that is the one which is being taken.
    for link in reversed(links):
        asked = ask, link.layer.key
        if asked not in answers:
            try:
                answers[asked] = ask(link.layer)
            except (OSError, DiffMergeError):
                answers[asked] = False  # the next `open` says what it is
        if answers[asked]:
            return True
    return False


def _each_over_its_parents(layers: Sequence[Layer]) -> Iterator[tuple[int, Parents, Layer]]:
    parents = Parents()
    for number, layer in enumerate(layers):
        if number and layer.size == layers[0].size:
            yield number, parents, layer
        parents.add(layer)


def _status(file: int | str) -> os.stat_result | None:
    try:
        return os.stat(file)
    except OSError:
        return None
