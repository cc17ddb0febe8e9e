"""The hash of a layer is that of its bytes on each file system."""

from __future__ import annotations

import hashlib
from pathlib import Path

from diffmergefs.core.layer import Layer
from diffmergefs.opening.pins import content_hash
from tests.support.images import PAGE, signed, write_layer

MIB = 1 << 20


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_hash_is_that_of_the_bytes_as_read(real_fs: Path) -> None:
    # Holes at both ends and in the middle, longer and shorter than a block, an odd end.
    size = 5 * MIB + PAGE + 17
    extents = [(MIB + PAGE, signed(1, 0, MIB + PAGE)), (4 * MIB, bytes(PAGE)), (size - 17, b"x")]
    path = write_layer(real_fs / "layer", size, extents)
    assert content_hash(Layer.open(str(path))) == sha256(path)
