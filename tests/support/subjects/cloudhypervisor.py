"""The store of the tests of Cloud Hypervisor's snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cloudhypervisor import write_snapshot
from tests.support.images import PAGE, overlay_oracle
from tests.support.stores import SIZE, pages

BASE = pages(0, range(SIZE // PAGE))
LEAF = overlay_oracle(SIZE, [BASE, pages(1, [1]), pages(2, [2, 15])])


@pytest.fixture
def store(public_path: Path) -> Path:
    root = public_path / "snapshots"
    write_snapshot(root, "base")
    write_snapshot(root, "work", "base", layer=1)
    write_snapshot(root, "leaf", "work", layer=2, numbers=[2, 15])
    return root
