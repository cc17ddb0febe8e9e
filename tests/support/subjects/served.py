"""The store of the tests of what a mount serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffmergefs.fuse.served import Store
from diffmergefs.opening.trust import TrustPolicy
from tests.support.stores import OLD_NS, SECOND_NS, write_chain


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_chain(tmp_path / "store", ["base", "work", "leaf"])


def looked(root: Path) -> Store:
    store = Store(str(root), TrustPolicy(), clock=lambda: OLD_NS + 100 * SECOND_NS)
    store.look()
    return store
