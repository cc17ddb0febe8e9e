"""Which snapshots of a changing directory may be shown: judged look by look, no file is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.identity import FileKey, FileVersion
from diffmergefs.stores.catalog import Catalog
from diffmergefs.stores.snapshot import Snapshot, StoredFile

SETTLING_NS = 2_000_000_000

# Of how many tags that are gone it is remembered which parent they had.
_REMEMBERED = 10_000


class _Pair(NamedTuple):
    # A snapshot's own layer, its parent's tag, and the layer which that one had.
    own: FileKey
    parent: str
    content: FileKey


class _Moment(NamedTuple):
    # Which memory, with which device state. A chmod, or a link made, is another version of a file,
    # but no other device state.
    memory: FileKey | None
    device_state: dict[str, FileKey | None]

    @classmethod
    def of(cls, snapshot: Snapshot) -> _Moment:
        seen = snapshot.device_state.items()
        keys = {path: version and FileKey(*version[:4]) for path, version in seen}
        return cls(snapshot.memory and snapshot.memory.key, keys)


class Watch:
    """Judges successive looks at one directory of snapshots.

    `content_hash` gives the hex sha256 of a stored file, or None as long as it is not known; it is
    asked only when the parent of a snapshot was replaced and the snapshot records the hash of its
    parent.
    """

    def __init__(self, content_hash: Callable[[StoredFile], str | None]) -> None:
        self._content_hash = content_hash
        self._states: dict[str, object] = {}
        self._moments: dict[str, _Moment] = {}
        self._shown: dict[str, list[FileKey]] = {}
        # Each tag with the parent that it was first seen with, both settled.
        self._pairs: dict[str, _Pair] = {}
        self._waiting: set[str] = set()
        #: After a look: the version of each file of device state, by its path, that goes with its
        #: tag's memory. None where none does: it was not there, two looks must first agree on it
        #: and on the memory, or the tag is not shown.
        self.device_state: Mapping[str, FileVersion | None] = {}

    def judge(self, catalog: Catalog, now_ns: int) -> tuple[dict[str, list[Snapshot]], set[str]]:
        """The chains that may be shown after this look, by tag, and the tags that must settle.

        A tag is shown once its files and its ancestors' were the same in two looks, or at once if
        none was modified within the last two seconds. One that is shown with the same layers
        stays, whatever else changes beside them. A snapshot whose parent was replaced under it is
        marked broken in `catalog`, and so are its descendants; while the hash of the new parent is
        not known they must settle. Another parent_tag in a document is no replacement: it says
        that the diff is meant for that parent.
        """
        self._waiting.clear()
        for snapshot in catalog.snapshots.values():
            if problem := self._judge_parent(catalog, snapshot, now_ns):
                catalog.reject(snapshot.tag, problem)
        self._forget(catalog)
        shown: dict[str, list[Snapshot]] = {}
        unsettled: set[str] = set()
        for tag in catalog.snapshots:
            try:
                links = catalog.chain(tag)
            except DiffMergeError:
                continue
            same_layers = self._shown.get(tag) == [link.layer.key for link in links]
            if same_layers or all(self._is_settled(link, now_ns) for link in links):
                shown[tag] = links
            else:
                unsettled.add(tag)
        self.device_state = self._steady(catalog, shown, now_ns)
        self._states = {tag: s.state for tag, s in catalog.snapshots.items()}
        self._moments = {tag: _Moment.of(s) for tag, s in catalog.snapshots.items()}
        self._shown = {tag: [link.layer.key for link in links] for tag, links in shown.items()}
        return shown, unsettled

    def _is_settled(self, link: Snapshot, now_ns: int) -> bool:
        if link.tag in self._waiting:
            return False
        return link.newest_ns < now_ns - SETTLING_NS or self._states.get(link.tag) == link.state

    def _steady(
        self, catalog: Catalog, shown: Mapping[str, list[Snapshot]], now_ns: int
    ) -> dict[str, FileVersion | None]:
        # A VMM replaces memory and device state one after the other, and a look may come between.
        # One that went may come back before the next look.
        found = {path: None for path, seen in self.device_state.items() if seen}
        found |= {path: None for s in catalog.snapshots.values() for path in s.device_state}
        steady: dict[str, FileVersion | None] = {**found}
        for links in shown.values():
            own = links[-1]
            before = self._moments.get(own.tag)
            if self._is_settled(own, now_ns) if before is None else before == _Moment.of(own):
                steady |= own.device_state
        return steady

    def _judge_parent(self, catalog: Catalog, snapshot: Snapshot, now_ns: int) -> str | None:
        # The problem with its parent, if there is one.
        if snapshot.problem is not None or snapshot.memory is None:
            return None
        first = self._first_seen(snapshot)
        if snapshot.parent is None:
            return first and (
                f"parent missing: {snapshot.memory.path} was first seen as a diff of"
                f" '{first.parent}'; put that back, or take the diff again"
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
        # A parent that is still being copied in is not yet the one that counts.
        if self._is_settled(snapshot, now_ns) and self._is_settled(parent, now_ns):
            pair = _Pair(snapshot.memory.key, snapshot.parent, parent.memory.key)
            self._pairs[snapshot.tag] = pair
        return None

    def _first_seen(self, snapshot: Snapshot) -> _Pair | None:
        # What it must be held against: nothing, if the diff is another one by now, or its document
        # names another parent.
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
