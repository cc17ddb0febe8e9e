"""What the tests of commands that write a diff share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.layer import Layer
from diffmergefs.sidecars import seal


def data_of(path: Path) -> list[tuple[int, int]]:
    """Where the file has data, as the filesystem says."""
    with path.open("rb") as file:
        extents = sparse.data_extents(file.fileno(), path.stat().st_size)
        return [(start, stop) for start, stop in extents]


def assert_sealed(path: Path, extents: Sequence[tuple[int, int]]) -> None:
    """The file has a seal with these extents, and its checksums are right."""
    found = seal.find(str(path))
    assert found is not None
    assert [(start, stop) for start, stop in found.content.extents()] == list(extents)
    seal.compare(Layer.open(str(path)), found)


def harm_writes(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Have what is written at this offset reach the file with another first byte."""
    real = os.pwrite

    def harmed(fd: int, data: Any, offset: int) -> int:
        content = bytes(data)
        return real(fd, bytes([content[0] ^ 1]) + content[1:] if offset == at else content, offset)

    monkeypatch.setattr(os, "pwrite", harmed)
