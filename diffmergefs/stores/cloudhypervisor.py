"""Cloud Hypervisor's snapshots: directories with `memory-ranges`, `state.json`, `config.json`.

Cloud Hypervisor writes complete images only; since 2026 it leaves holes where memory is zero. A
directory that also has a `snapshot.json` (as in a forkd store) with a `parent_tag` holds a diff
instead: so without that document an image with holes may be either.
"""

from __future__ import annotations

from dataclasses import replace

from diffmergefs.core.beneath import Root
from diffmergefs.stores.document import describe
from diffmergefs.stores.ranges import MEMORY, STATE, with_ranges
from diffmergefs.stores.reader import FolderReader, Source, has_file
from diffmergefs.stores.snapshot import DOCUMENT, Snapshot, find_regular, undocumented, with_records


class CloudHypervisorReader(FolderReader):
    """Directories with a `memory-ranges`."""

    name = "cloud-hypervisor"
    documents = (DOCUMENT,)
    device_state = (STATE, "config.json")

    def is_tag(self, root: Root, name: str) -> bool:
        return has_file(root, f"{name}/{MEMORY}")

    def describe(self, source: Source, tag: str, seen: Snapshot) -> Snapshot:
        root = source.root
        if has_file(root, f"{tag}/{DOCUMENT}"):
            return with_ranges(root, describe(root, seen, source.paths))
        memory = find_regular(root, f"{tag}/{MEMORY}")
        layer = memory and with_records(root, memory, is_diff=False)
        return with_ranges(root, replace(seen, memory=layer, doubt=undocumented(tag, MEMORY)))
