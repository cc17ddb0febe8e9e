"""The filesystems of this room: what a test wrote there is gone after it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(name="filesystem")
def _emptied(filesystem: Callable[[str], Path]) -> Iterator[Callable[[str], Path]]:
    """The fixture of that name, whose directories go with the test: many such tests fill a disk."""
    made: list[Path] = []

    def fresh_directory(kind: str) -> Path:
        made.append(filesystem(kind))
        return made[-1]

    yield fresh_directory
    for path in made:
        shutil.rmtree(path)
