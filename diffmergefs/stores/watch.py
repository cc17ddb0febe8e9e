"""Which snapshots of a changing directory may be served: judged look by look, by metadata."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from diffmergefs.core import workers
from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.identity import FileKey, FileVersion
from diffmergefs.stores.catalog import Catalog
from diffmergefs.stores.snapshot import Snapshot, StoredFile

log = logging.getLogger(__name__)

SETTLING_NS = 2_000_000_000

# For how many tags that are gone the parent is remembered.
_REMEMBERED = 10_000


class _Pair(NamedTuple):
    # A snapshot's own layer, its parent's tag, and the parent's layer.
    own: FileKey
    parent: str
    content: FileKey


class _Moment(NamedTuple):
    # Which memory, with which device state. A chmod or a new link makes another version of a file,
    # but not another device state.
    memory: FileKey | None
    device_state: dict[str, FileKey | None]

    @classmethod
    def of(cls, snapshot: Snapshot) -> _Moment:
        seen = snapshot.device_state.items()
        keys = {path: version and FileKey(*version[:4]) for path, version in seen}
        return cls(snapshot.memory and snapshot.memory.key, keys)


class _Seen(NamedTuple):
    # A snapshot as the last look saw it, with the layers of its chain if it may be served.
    state: object
    moment: _Moment
    layers: list[FileKey] | None


class Memory(NamedTuple):
    """What a `Watch` knows of a directory: how each snapshot was seen, and with which parent."""

    seen: dict[str, _Seen]
    pairs: dict[str, _Pair]
    device_state: Mapping[str, FileVersion | None]


class Watch:
    """Judges successive looks at one directory of snapshots.

    `content_hash` returns the hex sha256 of a stored file, or None while it is not known. It is
    called only if the parent of a snapshot was replaced and the snapshot records its parent's hash.
    """

    def __init__(self, content_hash: Callable[[StoredFile], str | None]) -> None:
        self._content_hash = content_hash
        self._seen: dict[str, _Seen] = {}
        # Each tag with the parent that it was first seen with, when both had settled.
        self._pairs: dict[str, _Pair] = {}
        self._waiting: set[str] = set()
        #: After a look: the version of each file of device state, by its path, that belongs to its
        #: tag's memory. None if there is none: the file was missing, two looks do not agree yet on
        #: it and on the memory, or the tag is not served.
        self.device_state: Mapping[str, FileVersion | None] = {}

    @property
    def memory(self) -> Memory:
        """What the next look is compared with. It can be pickled, and set in another process."""
        return Memory(self._seen, dict(self._pairs), self.device_state)

    @memory.setter
    def memory(self, memory: Memory) -> None:
        self._seen, self._pairs, self.device_state = memory

    def judge(self, catalog: Catalog, now_ns: int) -> tuple[dict[str, list[Snapshot]], set[str]]:
        """The chains that may be served after this look, by tag, and the tags that must settle.

        A tag is served once two looks saw the same files for it and its ancestors, or at once if
        none of them was modified within the last two seconds. A tag that is served with the same
        layers stays, whatever else changes beside them. A snapshot whose parent was replaced is
        marked broken in `catalog`, and so are its descendants. While the hash of the new parent is
        not known they must settle. Another parent_tag in a document is no replacement: it declares
        the diff to be one of that parent.
        """
        self._waiting.clear()
        for snapshot in catalog.snapshots.values():
            if problem := self._judge_parent(catalog, snapshot, now_ns):
                catalog.reject(snapshot.tag, problem)
        self._forget(catalog)
        chains: dict[str, list[Snapshot]] = {}
        unsettled: set[str] = set()
        layers: dict[str, list[FileKey]] = {}
        for tag in catalog.snapshots:
            try:
                links = catalog.chain(tag)
            except DiffMergeError:
                continue
            keys = [link.layer.key for link in links]
            before = self._seen.get(tag)
            same_layers = before is not None and before.layers == keys
            if same_layers or all(self._is_settled(link, now_ns) for link in links):
                chains[tag], layers[tag] = links, keys
            else:
                unsettled.add(tag)
        self.device_state = self._steady(catalog, chains, now_ns)
        self._seen = {
            tag: _Seen(s.state, _Moment.of(s), layers.get(tag))
            for tag, s in catalog.snapshots.items()
        }
        return chains, unsettled

    def _is_settled(self, link: Snapshot, now_ns: int) -> bool:
        if link.tag in self._waiting:
            return False
        before = self._seen.get(link.tag)
        is_same = before is not None and before.state == link.state
        return is_same or link.newest_ns < now_ns - SETTLING_NS

    def _steady(
        self, catalog: Catalog, chains: Mapping[str, list[Snapshot]], now_ns: int
    ) -> dict[str, FileVersion | None]:
        # A VMM replaces memory and device state one after the other, and a look may come between.
        # A file that went may come back before the next look.
        found = {path: None for path, seen in self.device_state.items() if seen}
        found |= {path: None for s in catalog.snapshots.values() for path in s.device_state}
        steady: dict[str, FileVersion | None] = {**found}
        for links in chains.values():
            own = links[-1]
            before = self._seen.get(own.tag)
            if (
                self._is_settled(own, now_ns)
                if before is None
                else before.moment == _Moment.of(own)
            ):
                steady |= own.device_state
        return steady

    def _judge_parent(self, catalog: Catalog, snapshot: Snapshot, now_ns: int) -> str | None:
        # The problem with the snapshot's parent, if there is one.
        if snapshot.problem is not None or snapshot.memory is None:
            return None
        first = self._first_seen(snapshot)
        if snapshot.parent is None:
            return first and (
                f"parent missing: {snapshot.memory.path} was first seen as a diff of"
                f" '{first.parent}'; put that parent back, or take the diff again"
            )
        parent = catalog.snapshots.get(snapshot.parent)
        if parent is None or parent.memory is None:
            return None
        if first is not None and first.content != parent.memory.key:
            fits = self._fits(parent.memory, snapshot.parent_hash)
            if fits is None:
                self._waiting.add(snapshot.tag)
                return None
            if not fits:
                return (
                    f"parent replaced: {parent.memory.path} is not the file that '{snapshot.tag}'"
                    " was first seen with; take the diff again"
                )
        # A parent that is still being copied in does not count yet.
        if self._is_settled(snapshot, now_ns) and self._is_settled(parent, now_ns):
            pair = _Pair(snapshot.memory.key, snapshot.parent, parent.memory.key)
            self._pairs[snapshot.tag] = pair
        return None

    def _first_seen(self, snapshot: Snapshot) -> _Pair | None:
        # What the snapshot must agree with: nothing if the diff is another one now, or if its
        # document names another parent.
        first = self._pairs.get(snapshot.tag)
        if first is None or first.own != snapshot.layer.key:
            return None
        is_restated = snapshot.document is not None and first.parent != snapshot.parent
        return None if is_restated else first

    def _fits(self, parent: StoredFile, recorded: str | None) -> bool | None:
        if recorded is None:
            return False
        try:
            found = self._content_hash(parent)
        except (OSError, DiffMergeError):
            return False
        return None if found is None else found == recorded

    def _forget(self, catalog: Catalog) -> None:
        gone = [tag for tag in self._pairs if tag not in catalog.snapshots]
        for tag in gone[:-_REMEMBERED]:
            del self._pairs[tag]


class HashQueue:
    """Hashes stored files one after another in its own thread. Safe for several threads.

    `content_hash` returns the hash of a file. It may block, and raise DiffMergeError or OSError:
    then the reason is logged once, and the file is tried again after the others when somebody asks
    for it again. The end of the process does not wait for the thread.
    """

    def __init__(self, content_hash: Callable[[StoredFile], str]) -> None:
        self._content_hash = content_hash
        self._known: dict[FileKey, str] = {}
        self._waiting: dict[FileKey, StoredFile] = {}
        self._failures: dict[FileKey, str] = {}
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def ask(self, file: StoredFile) -> str | None:
        """The hash of the file, or None while it is not known. Never blocks."""
        with self._lock:
            if (digest := self._known.get(file.key)) is not None:
                return digest
            self._waiting[file.key] = file
            if self._thread is None or not self._thread.is_alive():
                # If no thread can be started, the next look asks again.
                self._thread = workers.started(self._hash_all, "hashes")
        return None

    def forget_all_but(self, keys: Collection[FileKey]) -> None:
        """Forget everything about other files than these."""
        tables: tuple[dict[FileKey, Any], ...] = (self._known, self._waiting, self._failures)
        with self._lock:
            for table in tables:
                for key in table.keys() - keys:
                    del table[key]

    def _hash_all(self) -> None:
        while file := self._next():
            try:
                self._hash(file)
            finally:
                with self._lock:
                    self._waiting.pop(file.key, None)

    def _next(self) -> StoredFile | None:
        with self._lock:
            if not self._waiting:
                self._thread = None  # under the same lock, so that `ask` cannot miss the end
                return None
            return next(iter(self._waiting.values()))

    def _hash(self, file: StoredFile) -> None:
        try:
            digest = self._content_hash(file)
        except (OSError, DiffMergeError) as error:
            with self._lock:
                is_news = str(error) != self._failures.get(file.key)
                self._failures[file.key] = str(error)
            if is_news:
                log.warning("%s: its hash cannot be found: %s", file.path, error)
            return
        with self._lock:
            self._known[file.key] = digest
