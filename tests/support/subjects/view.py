"""Views of the tests of the merge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from tests.support.images import PAGE, signed, write_layer

Extents = list[tuple[int, bytes]]


def open_view(directory: Path, size: int, chain: Sequence[Extents]) -> MergedView:
    return MergedView(
        [
            Layer.open(str(write_layer(directory / f"{n}.mem", size, extents)))
            for n, extents in enumerate(chain)
        ]
    )


def data(layer: int, first: int, pages: int) -> tuple[int, bytes]:
    """The extent of these pages, signed by the layer."""
    return first * PAGE, signed(layer, first * PAGE, pages * PAGE)
