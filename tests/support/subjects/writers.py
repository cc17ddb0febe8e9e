"""The layer of the tests of writers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from diffmergefs.core.layer import Layer
from tests.support.images import PAGE, signed, write_layer


def written(folder: Path, name: str = "layer") -> Path:
    return write_layer(folder / name, 4 * PAGE, [(PAGE, signed(1, PAGE, PAGE))])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path)


@pytest.fixture
def layer(path: Path) -> Iterator[Layer]:
    with closing(Layer.open(str(path))) as opened:
        yield opened


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    number = os.open(path, os.O_RDONLY)
    yield number
    os.close(number)
