"""What mount(8) and its helper agree on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.stores import write_chain

USAGE, FAILED = 1, 32


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])
