"""Which snapshots of a changing directory may be shown: judged look by look, no file is opened."""

from __future__ import annotations

from collections.abc import Callable

from diffmergefs.catalog import Catalog
from diffmergefs.errors import DiffMergeError
from diffmergefs.layer import FileKey
from diffmergefs.snapshot import Snapshot, StoredFile

SETTLING_NS = 2_000_000_000


class Watch:
    """Judges successive looks at one directory of snapshots.

    `content_hash` gives the hex sha256 of a stored file; it is asked only when the parent of a
    snapshot was replaced and the snapshot records the hash of its parent.
    """

    def __init__(self, content_hash: Callable[[StoredFile], str]) -> None:
        self._content_hash = content_hash
        self._states: dict[str, object] = {}
        self._shown: dict[str, list[FileKey]] = {}
        # For each tag the content of its own layer and that of the parent it was first seen
        # with, both settled.
        self._pairs: dict[str, tuple[FileKey, FileKey]] = {}

    def judge(self, catalog: Catalog, now_ns: int) -> tuple[dict[str, list[Snapshot]], set[str]]:
        """The chains that may be shown after this look, by tag, and the tags that must settle.

        A tag is shown once its files and its ancestors' were the same in two looks, or at once if
        none was modified within the last two seconds. One that is shown with the same layers
        stays, whatever else changes beside them. A snapshot whose parent was replaced under it is
        marked broken in `catalog`, and so are its descendants.
        """
        for snapshot in catalog.snapshots.values():
            if self._has_new_parent(catalog, snapshot, now_ns):
                catalog.reject(
                    snapshot.tag,
                    f"parent replaced: {catalog.snapshots[snapshot.parent or ''].layer.path} is not"
                    f" the file that '{snapshot.tag}' was first seen with; take the diff again",
                )
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
        self._states = {tag: s.state for tag, s in catalog.snapshots.items()}
        self._shown = {tag: [link.layer.key for link in links] for tag, links in shown.items()}
        return shown, unsettled

    def _is_settled(self, link: Snapshot, now_ns: int) -> bool:
        return link.newest_ns < now_ns - SETTLING_NS or self._states.get(link.tag) == link.state

    def _has_new_parent(self, catalog: Catalog, snapshot: Snapshot, now_ns: int) -> bool:
        parent = catalog.snapshots.get(snapshot.parent) if snapshot.parent else None
        if snapshot.memory is None or parent is None or parent.memory is None:
            return False
        pair = (snapshot.memory.key, parent.memory.key)
        known = self._pairs.get(snapshot.tag)
        is_other_parent = known is not None and known[0] == pair[0] and known[1] != pair[1]
        if is_other_parent and not self._fits(parent.memory, snapshot.parent_hash):
            return True
        # A parent that is still being copied in is not yet the one that counts.
        if self._is_settled(snapshot, now_ns) and self._is_settled(parent, now_ns):
            self._pairs[snapshot.tag] = pair
        return False

    def _fits(self, parent: StoredFile, recorded: str | None) -> bool:
        if recorded is None:
            return False
        try:
            return self._content_hash(parent) == recorded
        except (OSError, DiffMergeError):
            return False
