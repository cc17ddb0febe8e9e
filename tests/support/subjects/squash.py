"""The chain of the tests of squash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmergefs.core.extents import ExtentList
from tests.support.images import PAGE
from tests.support.inputs import unchanged
from tests.support.randomchains import Extents, write_chain
from tests.support.stores import pages

SIZE = 64 * PAGE
ZEROS = [(4 * PAGE, bytes(PAGE))]

CHAIN: list[Extents] = [
    pages(0, range(32)),
    [*pages(1, [2, 20]), *ZEROS],
    [*pages(2, [20, 40]), (41 * PAGE, bytes(PAGE))],
    pages(3, [2, 63]),
]


def joined(*layers: Extents) -> list[tuple[int, int]]:
    """Where any of the layers has data."""
    starts = sorted({(at, at + len(data)) for extents in layers for at, data in extents})
    return [(start, stop) for start, stop in ExtentList(starts)]


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[list[Path]]:
    """The files of CHAIN, which must not change."""
    (tmp_path / "in").mkdir()
    paths = write_chain(tmp_path / "in", SIZE, CHAIN)
    with unchanged(paths):
        yield paths
