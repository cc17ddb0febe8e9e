"""The files of the tests of applying a diff."""

from __future__ import annotations

from pathlib import Path

from tests.support.images import PAGE, signed, write_layer

Extents = list[tuple[int, bytes]]

SIZE = 16 * PAGE


def pages(layer: int, *numbers: int) -> Extents:
    """These pages of the layer, as extents of signed bytes."""
    return [(n * PAGE, signed(layer, n * PAGE, PAGE)) for n in numbers]


def pair(directory: Path, base: Extents, diff: Extents, size: int = SIZE) -> tuple[Path, Path]:
    """A diff and a base."""
    written = write_layer(directory / "diff.mem", size, diff)
    return written, write_layer(directory / "base.mem", size, base)
