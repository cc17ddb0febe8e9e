"""Opening one of two images that are to be compared: an IMAGE, or any file as it is."""

from __future__ import annotations

import os
from collections.abc import Sequence

from diffmergefs.opening.images import Image, open_chain, open_image
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.lookup import is_image


def open_side(
    path: str | os.PathLike[str],
    diffs: Sequence[str | os.PathLike[str]] = (),
    policy: TrustPolicy | None = None,
    *,
    plain: bool = False,
) -> Image:
    """Open an IMAGE, or any other file as a complete image: its holes are zeros.

    A snapshot directory and a numbered layer are opened by `images.open_image`. Every other file,
    and any file if it is `plain` or has `diffs` over it, oldest first, is opened as a base by
    `images.open_chain`. That a file is a diff and no image by itself cannot be told. Raises
    DiffMergeError.
    """
    if diffs or plain or not is_image(path):
        return open_chain(path, diffs, policy)
    return open_image(path, policy)
