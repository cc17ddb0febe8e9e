"""A mount of Cloud Hypervisor's snapshots."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.support.mounts import mounted
from tests.support.subjects.cloudhypervisor import LEAF, store

__all__ = ["store"]


def test_a_mounted_tag_is_a_directory_to_restore_from(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        folder = mountpoint / "leaf"
        names = ["config.json", "memory-ranges", "snapshot.json", "state.json"]
        assert sorted(os.listdir(folder)) == names
        assert (folder / "memory-ranges").read_bytes() == LEAF
        assert (folder / "state.json").read_bytes() == (store / "leaf/state.json").read_bytes()
        document = json.loads((folder / "snapshot.json").read_text())
        assert document == {"memory": f"{mountpoint}/leaf/memory-ranges"}
        assert not (mountpoint / "base" / "snapshot.json").exists()
