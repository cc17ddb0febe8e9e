"""What is open: one handle for each open file or directory of a mount."""

from __future__ import annotations

from collections.abc import Hashable

from diffmergefs.core.identity import FileKey
from diffmergefs.fuse.contents import Content
from diffmergefs.fuse.served import OpenImage
from diffmergefs.fuse.tree import Node, Passed


def lane_of(*devices: int) -> Hashable:
    """The lane of work on files of these filesystems (st_dev): see `threads.Lanes`."""
    return frozenset(devices)


class Handle:
    """An open file or directory: exactly one of the four is what it reads from.

    `fd` is of the file `node`, on the filesystem `device`.
    """

    __slots__ = (
        *("device", "fd", "key", "names", "node", "shown", "supplied", "text", "view"),
        "_devices",
    )

    def __init__(
        self,
        shown: OpenImage | None = None,
        fd: int | None = None,
        text: Content | None = None,
        names: Content | None = None,
        node: Node | None = None,
        key: FileKey | None = None,
    ) -> None:
        self.shown, self.fd, self.text, self.names = shown, fd, text, names
        self.node = node  # what `fd` or `names` are of
        self.key = key  # what `fd` must stay
        self.device = node.device if isinstance(node, Passed) else 0
        self.view = shown.image.view if shown else None
        self._devices = [layer.status.st_dev for layer in self.view.layers] if self.view else []
        self.supplied: dict[int, int] = {}

    def lane(self, start: int, length: int) -> Hashable:
        """That of the filesystems from which the image's bytes of this range come."""
        assert self.view is not None
        numbers = {segment.layer for segment in self.view.segments(start, length)}
        return lane_of(*(self._devices[number] for number in numbers if number is not None))
