"""The images and chains of the tests of rediff and squash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmergefs.core.extents import ExtentList
from diffmergefs.core.view import MergedView
from tests.support.images import PAGE, write_layer
from tests.support.inputs import unchanged
from tests.support.randomchains import Extents, open_view, write_chain
from tests.support.stores import age, pages

MIB = 1 << 20
SIZE = 64 * PAGE

#: The parent has data and holes; in the child pages are new, other, zero and, where it was a hole
#: in both, written zeros.
PARENT = pages(0, range(32))
CHILD = [*pages(0, range(2)), *pages(1, range(2, 4)), *pages(0, range(5, 31)), *pages(1, [40, 63])]
CHANGED = [(2 * PAGE, 5 * PAGE), (31 * PAGE, 32 * PAGE), (40 * PAGE, 41 * PAGE), (63 * PAGE, SIZE)]


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[MergedView, MergedView]]:
    """Two plain files, which must not change."""
    (tmp_path / "in").mkdir()
    files = [write_layer(tmp_path / "in" / "parent", SIZE, PARENT)]
    files.append(write_layer(tmp_path / "in" / "child", SIZE, CHILD))
    age(*files)
    with unchanged(files), open_view(files[:1]) as parent, open_view(files[1:]) as child:
        yield parent, child


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
