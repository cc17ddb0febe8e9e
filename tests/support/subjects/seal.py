"""Sealed diffs, and bmaptool."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from diffmergefs.core.layer import Layer
from diffmergefs.opening.opener import Opener
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.sealing import seal_layer
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.stores import age

SIZE = 16 * PAGE
BASE = [(0, signed(0, 0, SIZE))]
DIFF = [(2 * PAGE, signed(1, 2 * PAGE, PAGE)), (5 * PAGE, bytes(2 * PAGE))]
EXTENTS = [(2 * PAGE, 3 * PAGE), (5 * PAGE, 7 * PAGE)]
ORACLE = overlay_oracle(SIZE, [BASE, DIFF])


@pytest.fixture
def diff(tmp_path: Path) -> Path:
    """A sealed diff whose holes a copy has filled since."""
    return filled(tmp_path / "diff")


def filled(path: Path) -> Path:
    write_layer(path, SIZE, DIFF)
    seal_layer(path)
    path.write_bytes(path.read_bytes())
    age(path)
    return path


def opened(path: Path, **policy: object) -> Layer:
    return Opener(TrustPolicy(**policy)).open(str(path))  # type: ignore[arg-type]


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    age(path, mtime_ns=path.stat().st_mtime_ns + 1_000_000_000)


def bmaptool(*arguments: str | Path) -> None:
    command = ["bmaptool", "--quiet", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
