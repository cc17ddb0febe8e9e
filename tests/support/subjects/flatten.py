"""The chain of the tests of flatten."""

from __future__ import annotations

import os
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged

Extents = list[tuple[int, bytes]]

PAGES = 64
SIZE = PAGES * PAGE


def pages(layer: int, *numbers: int) -> Extents:
    """These pages of the layer, as extents of signed bytes."""
    return [(n * PAGE, signed(layer, n * PAGE, PAGE)) for n in numbers]


# A chain in which each rule counts: the base has holes, page 2 is overridden with data, page 4
# with zeros, page 20 twice, and page 40 is data in a diff only.
CHAIN: list[Extents] = [
    pages(0, *range(32)),
    [*pages(1, 2, 20), (4 * PAGE, bytes(PAGE))],
    pages(2, 20, 40),
]

ORACLE = overlay_oracle(SIZE, CHAIN)
VISIBLE = (29 * PAGE, 2 * PAGE, 2 * PAGE)


def write_chain(directory: Path, chain: Sequence[Extents] = CHAIN, size: int = SIZE) -> list[Path]:
    return [
        write_layer(directory / f"{n:03}.mem", size, extents) for n, extents in enumerate(chain)
    ]


def open_view(paths: Sequence[Path]) -> MergedView:
    return MergedView([Layer.open(str(path)) for path in paths])


def data_of(path: Path) -> ExtentList:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return ExtentList(sparse.data_extents(file.fileno(), path.stat().st_size))


def data_of_view(view: MergedView) -> ExtentList:
    return ExtentList((s.start, s.stop) for s in view.segments() if s.layer is not None)


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[MergedView]:
    """The view of CHAIN, whose layers lie in a directory of their own and must not change."""
    layers = tmp_path / "layers"
    layers.mkdir()
    paths = write_chain(layers)
    with unchanged(paths), open_view(paths) as view:
        yield view
        assert sorted(layers.iterdir()) == sorted(paths)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output in an empty directory."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "whole.mem"


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


Space = namedtuple("Space", "f_blocks f_bavail f_frsize")


def change(path: str, how: str) -> None:
    if how == "truncate":
        os.truncate(path, PAGE)
    else:
        with open(path, "r+b") as file:
            file.write(b"changed!")
