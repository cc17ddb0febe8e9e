"""The extended attributes of a memory file: what it is made of."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence

from diffmergefs.core.layer import Layer

_PREFIX = b"user.diffmergefs."
#: XATTR_SIZE_MAX of linux/limits.h: the kernel hands on no value that is longer.
LONGEST = 65536


def _chain(layers: Sequence[Layer], root: str) -> str:
    facts = [
        {"path": os.path.join(root, layer.path), "data_bytes": layer.extents.data_bytes}
        for layer in layers
    ]
    return json.dumps(facts)


_VALUES: dict[bytes, Callable[[Sequence[Layer], str], str]] = {
    _PREFIX + b"chain": _chain,
    _PREFIX + b"layers": lambda layers, root: str(len(layers)),
    _PREFIX + b"dirty_bytes": lambda layers, root: str(layers[-1].extents.data_bytes),
}
#: All of them.
NAMES = list(_VALUES)


def value(layers: Sequence[Layer], root: str, name: bytes) -> bytes:
    """The attribute `name`, one of NAMES, of the file that shows these layers, base first.

    `user.diffmergefs.chain` is JSON in ASCII: a list, base first, of each layer's `path`, relative
    ones beneath `root`, and `data_bytes`. `.layers` is their number and `.dirty_bytes` how many
    bytes are data in the newest, both decimal. Reads no file. Raises OSError (E2BIG) for a chain
    whose JSON is longer than LONGEST bytes.
    """
    found = _VALUES[name](layers, root).encode("ascii")
    if len(found) > LONGEST:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG), os.fsdecode(name))
    return found
