"""The store of the tests of Superserve's snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.images import overlay_oracle
from tests.support.stores import BASE_PAGES, SIZE, pages
from tests.support.superserve import write_sandbox, write_template

BASE = pages(0, BASE_PAGES)
TAGS = ["templates+python", "vm-1", "vm-1+snap-2"]


@pytest.fixture
def store(public_path: Path) -> Path:
    """A template, a sandbox over it, and a saved snapshot of that sandbox, two levels down."""
    root = public_path / "snapshots"
    base = write_template(root)
    write_sandbox(root, "vm-1", base, numbers=[1, 5])
    write_sandbox(root, "vm-1/snap-2", base, layer=2, numbers=[5, 15])
    return root


def image(layer: int, numbers: list[int]) -> bytes:
    return overlay_oracle(SIZE, [BASE, pages(layer, numbers)])
