"""A store of pinned snapshots, to verify."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.support.stores import (
    write_tag,
)

ABSENT = "ab" * 32


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """base <- work <- leaf, all pinned."""
    store = tmp_path / "store"
    base = write_tag(store, "base")
    work = write_tag(store, "work", "base", layer=1, parent_content_hash=hash_of(base))
    write_tag(store, "leaf", "work", layer=2, parent_content_hash=hash_of(work))
    return store


def hash_of(folder: Path) -> str:
    return sha256(folder / "memory.bin")
