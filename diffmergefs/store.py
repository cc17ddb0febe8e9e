"""A directory of snapshots that is being served: looked over again and again, opened on demand."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffmergefs import beneath, sparse
from diffmergefs.access import Access, view_access
from diffmergefs.catalog import Catalog, read_catalog
from diffmergefs.errors import DiffMergeError, FileAccessError, LayerChangedError
from diffmergefs.images import Image, LayerPool, open_snapshot
from diffmergefs.layer import FileKey
from diffmergefs.mountpoint import FILESYSTEM_TYPE
from diffmergefs.snapshot import Snapshot, StoredFile
from diffmergefs.trust import TrustPolicy
from diffmergefs.watch import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class OpenImage:
    """One image as it is shown: a file name, a view, who may read it, one inode number's worth.

    Compares by identity: a changed chain, or changed access, is another OpenImage.
    """

    name: str
    image: Image
    access: Access
    visible: int
    mtime_ns: int

    @classmethod
    def of(cls, image: Image, name: str, access: Access) -> OpenImage:
        visible = sum(image.view.visible_bytes())
        newest = max(layer.status.st_mtime_ns for layer in image.view.layers)
        return cls(name, image, access, visible, newest)


class Store:
    """The snapshots of the directory `root`, as they may be shown now.

    `layout` and `suffix` are `read_catalog`'s. Every method that touches files blocks and belongs
    in a worker thread; all are safe to call from several. Nothing is ever written.
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
        self.fd = _open_root(root)
        self._layout = layout
        self._suffix = suffix
        self._policy = policy
        self._clock = clock
        self._pool = LayerPool(self.fd)
        self._watch = Watch(self._content_hash)
        self._hashes: dict[FileKey, str] = {}
        self._to_hash: dict[FileKey, StoredFile] = {}
        self._unhashable: dict[FileKey, str] = {}
        self._hashing: threading.Thread | None = None
        self._lock = threading.Lock()
        self._catalog = Catalog(self.root, layout or "forkd", {})
        self._shown: dict[str, list[Snapshot]] = {}
        self._images: dict[str, tuple[list[FileKey], OpenImage]] = {}
        self._refusals: dict[str, tuple[list[FileKey], DiffMergeError]] = {}
        self._complaints: dict[str, tuple[list[FileKey], str]] = {}
        self._said: dict[str, str] = {}

    def look(self) -> set[str]:
        """Look over the directory by metadata; afterwards `tags` and `chain` speak of it.

        Gives the tags that must settle before they can be shown. Images whose chain changed or
        whose layers are tainted are forgotten: the next `open` makes new ones. A directory that
        was renamed is followed, until another one stands at `root`. Raises DiffMergeError where
        the directory as a whole cannot be read; then nothing is shown.
        """
        try:
            self._follow_root()
            catalog = read_catalog(self.root, self._layout, self._suffix, self.fd)
        except DiffMergeError:
            with self._lock:
                self._shown, self._images = {}, {}
            raise
        catalog.recall(self._catalog)
        shown, unsettled = self._watch.judge(catalog, self._clock())
        self._say_changes(catalog, shown, unsettled)
        with self._lock:
            self._catalog, self._shown = catalog, shown
            images = dict(self._images)
        current = {tag: self._renewed(tag, *known) for tag, known in images.items()}
        with self._lock:
            for tag, known in images.items():
                if self._images.get(tag) is known:
                    del self._images[tag]
                    if renewed := current[tag]:
                        self._images[tag] = renewed
        self._forget(catalog)
        return unsettled

    def _follow_root(self) -> None:
        # It may have been deleted and made again, or be a filesystem that was mounted anew.
        here, there = _status(self.fd), _status(self.root)
        if there is None or not stat.S_ISDIR(there.st_mode):
            if here is not None and here.st_nlink == 0:
                raise FileAccessError(f"{self.root}: was deleted; it is shown when it is back")
            return
        if here is not None and os.path.samestat(here, there):
            return
        fd = _open_root(self.root)
        try:
            if sparse.mount_options(fd)[0] == FILESYSTEM_TYPE:
                raise FileAccessError(f"{self.root}: a diffmergefs was mounted over it")
            # In one step for all who use the number.
            os.dup2(fd, self.fd, inheritable=False)
        finally:
            os.close(fd)
        log.warning("%s: another directory stands there now, and is shown instead", self.root)

    def _forget(self, catalog: Catalog) -> None:
        # What is remembered of tags and files that are gone would grow as long as the mount lives.
        present = {s.memory.key for s in catalog.snapshots.values() if s.memory}
        with self._lock:
            for known in (self._refusals, self._complaints):
                for tag in known.keys() - self._shown.keys():
                    del known[tag]
            of_files: tuple[dict[FileKey, Any], ...]
            of_files = self._hashes, self._to_hash, self._unhashable
            for files in of_files:
                for key in files.keys() - present:
                    del files[key]

    def _renewed(
        self, tag: str, keys: list[FileKey], shown: OpenImage
    ) -> tuple[list[FileKey], OpenImage] | None:
        layers = shown.image.view.layers
        links = self.chain(tag)
        if links is None or any(layer.tainted for layer in layers):
            return None
        if [link.layer.key for link in links] != keys:
            return None
        try:
            name, access = self._name_and_access(shown.image, links)
        except OSError:
            return None
        if (name, access) != (shown.name, shown.access):
            return keys, OpenImage.of(shown.image, name, access)
        return keys, shown

    def _name_and_access(self, image: Image, links: list[Snapshot]) -> tuple[str, Access]:
        # A layer that is shared or was renamed was opened by another path than this chain's: who
        # may read the view follows from where its layers are now.
        paths = [link.layer.path for link in links]
        return os.path.basename(paths[-1]), view_access(image.view.layers, self.real_root, paths)

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
                log.log(logging.INFO if tag in shown else logging.WARNING, "%s: %s", tag, text)
        for tag in self._said.keys() - words.keys() - unsettled:
            log.info("%s: gone", tag)
        self._said = words

    @property
    def real_root(self) -> str:
        """Where the directory is now: it may have been renamed since it was opened."""
        return os.path.realpath(f"/proc/self/fd/{self.fd}")

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

    def open_layer(self, file: StoredFile) -> object:
        """Open, sync and walk one layer; the caller holds the answer until `open` has used it."""
        return self._pool.layer(file)

    def open(self, tag: str) -> OpenImage:
        """The image of `tag`, its chain opened, walked and merged now if it was not yet.

        Raises FileAccessError if the tag is not shown, DiffMergeError if a layer is refused: that
        holds until the chain changes. The reason goes to the log once.
        """
        links = self.chain(tag)
        if links is None:
            raise FileAccessError(f"{tag}: no such snapshot is shown")
        if known := self.opened(tag):
            return known
        keys = [link.layer.key for link in links]
        try:
            image = open_snapshot(links, self._pool, self._policy)
            shown = OpenImage.of(image, *self._name_and_access(image, links))
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
        for line in image.overridden:
            log.warning("%s", line)
        with self._lock:
            known_keys, known = self._images.get(tag, (None, None))
            if known is not None and known_keys == keys:
                return known  # another thread was faster: one image has one inode number
            self._images[tag] = keys, shown
            self._complaints.pop(tag, None)
        return shown

    def _complain(self, tag: str, keys: list[FileKey], text: str) -> None:
        # Once, however often somebody tries.
        with self._lock:
            is_new = self._complaints.get(tag) != (keys, text)
            self._complaints[tag] = keys, text
        if is_new:
            log.warning("%s: cannot be opened now: %s", tag, text)

    def _keys(self, tag: str) -> list[FileKey] | None:
        links = self.chain(tag)
        return None if links is None else [link.layer.key for link in links]

    def _content_hash(self, file: StoredFile) -> str | None:
        # In a thread of its own, one file after another: a look does not wait for it, and neither
        # does the end of the process.
        with self._lock:
            if (digest := self._hashes.get(file.key)) is not None:
                return digest
            self._to_hash[file.key] = file
        if self._hashing is None or not self._hashing.is_alive():
            self._hashing = threading.Thread(target=self._hash_all, daemon=True)
            self._hashing.start()
        return None

    def _hash_all(self) -> None:
        # One that fails is asked for again by the next look, and so comes after the others.
        while file := self._next_to_hash():
            try:
                self._hash(file)
            finally:
                with self._lock:
                    self._to_hash.pop(file.key, None)

    def _next_to_hash(self) -> StoredFile | None:
        with self._lock:
            return next(iter(self._to_hash.values()), None)

    def _hash(self, file: StoredFile) -> None:
        try:
            with open(beneath.open_regular(self.fd, file.path), "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
                if FileKey.of(os.fstat(content.fileno())) != file.key:
                    raise LayerChangedError(f"{file.path}: changed while it was hashed")
        except (OSError, DiffMergeError) as error:
            if str(error) != self._unhashable.get(file.key):
                log.warning("%s: its hash cannot be found: %s", file.path, error)
            self._unhashable[file.key] = str(error)
            return
        with self._lock:
            self._hashes[file.key] = digest


def _status(file: int | str) -> os.stat_result | None:
    try:
        return os.stat(file)
    except OSError:
        return None


def _open_root(root: str) -> int:
    try:
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise FileAccessError(f"{root}: {error.strerror}") from error
