"""An image as a mount serves it, with its extended attributes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.access import Access

_PREFIX = b"user.diffmergefs."
#: The kernel passes on no longer value: XATTR_SIZE_MAX in linux/limits.h.
LONGEST_XATTR = 65536


@dataclass(frozen=True, eq=False)
class OpenImage:
    """An open image under a file name. It has its own inode number.

    `visible` is the number of bytes that its layers supply. `tag` is the name that its counters go
    by: the tag, or the file name of an image without a tag. Images compare by identity: after
    a change of the chain or of the access rights, it is another OpenImage.
    """

    name: str
    view: MergedView
    access: Access
    visible: int
    mtime_ns: int
    tag: str

    @classmethod
    def of(cls, view: MergedView, name: str, access: Access, tag: str | None = None) -> OpenImage:
        """The image of this view, served under the file name `name`."""
        visible = sum(view.visible_bytes())
        newest = max(layer.status.st_mtime_ns for layer in view.layers)
        return cls(name, view, access, visible, newest, name if tag is None else tag)


def _chain(layers: Sequence[Layer], root: str) -> str:
    facts = [
        {"path": os.path.join(root, layer.path), "data_bytes": layer.extents.data_bytes}
        for layer in layers
    ]
    return json.dumps(facts)


_XATTRS: dict[bytes, Callable[[Sequence[Layer], str], str]] = {
    _PREFIX + b"chain": _chain,
    _PREFIX + b"layers": lambda layers, root: str(len(layers)),
    _PREFIX + b"dirty_bytes": lambda layers, root: str(layers[-1].extents.data_bytes),
}
#: The names of all extended attributes of a memory file.
XATTRS = list(_XATTRS)


def xattr(view: MergedView, root: str, name: bytes) -> bytes:
    """The value of the extended attribute `name`, one of XATTRS, of a memory file.

    `user.diffmergefs.chain` is a JSON list in ASCII: for each layer, base first, its `path`
    (relative paths are resolved against `root`) and its `data_bytes`. `.layers` is the number of
    layers and `.dirty_bytes` the number of data bytes in the newest one, both decimal. Reads no
    file. Raises OSError (E2BIG) if the value is longer than LONGEST_XATTR.
    """
    value = _XATTRS[name](view.layers, root).encode("ascii")
    if len(value) > LONGEST_XATTR:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG), os.fsdecode(name))
    return value
