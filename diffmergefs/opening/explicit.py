"""Explicit layers (--base, --diff): nothing but their user says which one is what."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from diffmergefs.core.errors import BrokenChainError
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView

log = logging.getLogger(__name__)


def require_distinct(layers: Sequence[Layer]) -> None:
    """Raise BrokenChainError if two of the open layers are one file, whatever their paths."""
    known: dict[tuple[int, int], Layer] = {}
    for layer in layers:
        other = known.setdefault(layer.key[:2], layer)
        if other is not layer:
            raise BrokenChainError(
                f"{layer.path}: is the same file as the layer {other.path}; give the full image"
                " with --base, and each diff over it once with --diff, oldest first"
            )


def warn_of_order(view: MergedView) -> None:
    """Log a warning, which names two files, if the view's layers may be in the wrong order.

    Then the base has data and supplies no byte of the view, or it has less data than one of the
    diffs and less than half of that shows. That is no proof: a guest may have written all of its
    memory. Reads no file.
    """
    base, *diffs = view.layers
    if not diffs or not base.extents.data_bytes:
        return
    held, shown = base.extents.data_bytes, view.visible_bytes()[0]
    largest = max(diffs, key=lambda diff: diff.extents.data_bytes)
    most = largest.extents.data_bytes
    if not shown or (held < most and shown * 2 < held):
        log.warning(
            "%s: the base has %d bytes of data, of which %d show in the image; the diff %s has %d:"
            " are they in the right order? --base is the full image, and each --diff lies over what"
            " comes before it",
            *(base.path, held, shown, largest.path, most),
        )
