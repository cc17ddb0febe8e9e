"""The diff of the tests of sealing."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffmergefs.sidecars import seal
from tests.support.images import PAGE, signed, write_layer

SIZE = 16 * PAGE
DIFF = [(2 * PAGE, signed(1, 2 * PAGE, PAGE)), (5 * PAGE, bytes(2 * PAGE))]
EXTENTS = [(2 * PAGE, 3 * PAGE), (5 * PAGE, 7 * PAGE)]


@pytest.fixture
def diff(tmp_path: Path) -> Path:
    return write_layer(tmp_path / "diff", SIZE, DIFF)


def recorded(layer: Path) -> list[tuple[int, int]]:
    found = seal.find(str(layer))
    return [] if found is None else list(found.content.extents())
