"""forkd's store, also our native form: a directory per tag, described by its snapshot.json."""

from __future__ import annotations

import re
from dataclasses import replace

from diffmergefs.core.beneath import Root
from diffmergefs.stores import cloudhypervisor
from diffmergefs.stores.document import describe, describe_undocumented
from diffmergefs.stores.reader import FolderReader, Source, has_file
from diffmergefs.stores.snapshot import DOCUMENT, Snapshot, version_of

_MEMORY = "memory.bin"
_VMSTATE = "vmstate"
_LEGAL_TAG = re.compile(r"[A-Za-z0-9_-](?:[A-Za-z0-9_.+-]{0,62}[A-Za-z0-9_-])?")


class ForkdReader(FolderReader):
    """Directories with a `snapshot.json`; without one, `memory.bin` and `vmstate` are a base.

    They are a base only if the memory has no hole: it may be a diff whose document is not written
    yet. A directory with a `memory-ranges` is Cloud Hypervisor's, whose reader reads a
    `snapshot.json` too.
    """

    name = "forkd"
    marks = f"TAG/{DOCUMENT}"
    documents = (DOCUMENT,)

    def is_tag(self, root: Root, name: str) -> bool:
        if has_file(root, f"{name}/{DOCUMENT}"):
            return not has_file(root, f"{name}/{cloudhypervisor.MEMORY}")
        return has_file(root, f"{name}/{_MEMORY}") and has_file(root, f"{name}/{_VMSTATE}")

    def describe(self, source: Source, tag: str, seen: Snapshot) -> Snapshot:
        if has_file(source.root, f"{tag}/{DOCUMENT}"):
            found = describe(source.root, seen, source.paths)
        else:
            path = f"{tag}/{_VMSTATE}"
            found = describe_undocumented(source.root, seen, _MEMORY)
            found = replace(found, device_state={path: version_of(source.root, path)})
        return cloudhypervisor.with_ranges(source.root, found)

    def read_folder(self, source: Source, path: str) -> Snapshot | None:
        """As in `FolderReader`, but a name that forkd does not accept as a tag is a problem."""
        found = super().read_folder(source, path)
        if found is None or _LEGAL_TAG.fullmatch(path) or found.folder is None:
            return found
        problem = (
            f"{path!r} is not a legal tag (1 to 64 letters, digits, - and _, with . and + inside)"
        )
        return replace(found, problem=problem)
