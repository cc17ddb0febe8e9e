"""The nodes of the mounted tree, their attributes and their inode numbers."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import weakref
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from diffmergefs.fuse.image import OpenImage

ROOT_INODE = 1


@dataclass(frozen=True)
class Root:
    """The mount's own directory."""


@dataclass(frozen=True)
class TagFolder:
    """The directory of one tag. `device` and `inode` are of its own directory, or of SOURCE."""

    tag: str
    device: int
    inode: int


@dataclass(frozen=True)
class MemoryFile:
    """A merged memory file. Another image of the same tag is another file."""

    image: OpenImage


@dataclass(frozen=True)
class Document:
    """A tag's rewritten snapshot.json: its size and sha256, and the file that was read for it.

    `replaced` means that this file is no longer in the tag's directory.
    """

    tag: str
    size: int
    digest: bytes
    device: int
    inode: int
    replaced: bool = False


@dataclass(frozen=True)
class Passed:
    """A file, directory or symlink of SOURCE that is passed through, by its path in SOURCE.

    `elsewhere` means that the mount shows it in another directory than its own.
    """

    path: str
    device: int
    inode: int
    kind: int
    elsewhere: bool = False


@dataclass(frozen=True)
class StatusFolder:
    """The unlisted directory in the root that holds the mount's status."""


@dataclass(frozen=True)
class StatusFile:
    """One file of the status directory. Its content is made when it is opened."""

    name: str


Node = Root | TagFolder | MemoryFile | Document | Passed | StatusFolder | StatusFile


class Attributes(NamedTuple):
    """The attributes of a node, as stat(2) gives them; `blocks` of 512 bytes.

    `constant` attributes never change.
    """

    mode: int
    uid: int
    gid: int
    size: int
    blocks: int
    nlink: int
    mtime_ns: int
    constant: bool = False


def lane_of(*devices: int) -> Hashable:
    """The lane for work on files of these filesystems (st_dev): see `threads.Lanes`."""
    return frozenset(devices)


def lane_of_node(node: Node) -> Hashable:
    """The lane for work on the node itself.

    Work on the root looks at the directories of all tags, so it has a lane of its own.
    """
    match node:
        case Passed() | TagFolder() | Document():
            return lane_of(node.device)
        case MemoryFile(image):
            return lane_of(*(layer.key.device for layer in image.view.layers))
    return type(node).__name__


class Inodes:
    """The inode numbers of nodes, which are never reused, and the kernel's lookups of each.

    `number`, `node` and `open_images` are safe for several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fresh = itertools.count(ROOT_INODE + 1)
        self._nodes: dict[int, Node] = {ROOT_INODE: Root()}
        self._numbers: dict[Node, int] = {Root(): ROOT_INODE}
        self._lookups: Counter[int] = Counter()
        # An image lives while it is served or a file of it is open, and its number lives as long as
        # the image, even if the kernel forgets it meanwhile. The kernel may remember a name for
        # days. That must not hold layers open: deleted ones would keep their space.
        self._images: weakref.WeakValueDictionary[int, OpenImage] = weakref.WeakValueDictionary()
        self._image_numbers: weakref.WeakKeyDictionary[OpenImage, int] = weakref.WeakKeyDictionary()

    def number(self, node: Node) -> int:
        """The inode number of the node: a new one if it has none yet."""
        with self._lock:
            if isinstance(node, MemoryFile):
                number = self._image_numbers.get(node.image) or next(self._fresh)
                self._image_numbers[node.image] = number
                self._images[number] = node.image
            else:
                number = self._numbers.get(node) or next(self._fresh)
                self._numbers[node] = number
                self._nodes[number] = node
            return number

    def node(self, number: int) -> Node:
        """The node with this inode number.

        Raises OSError (ESTALE) if it was forgotten, or if it is an image that is neither served nor
        held open any more. The kernel then looks its name up again.
        """
        with self._lock:
            node = self._nodes.get(number)
            image = self._images.get(number)
        if node is not None:
            return node
        if image is not None:
            return MemoryFile(image)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), f"inode {number}")

    def look_up(self, number: int) -> None:
        """Count one lookup by the kernel, which it takes back with `forget`."""
        self._lookups[number] += 1

    def forget(self, number: int, lookups: int = 0) -> None:
        """Take back this many lookups, and drop the node if the kernel has no others."""
        self._lookups[number] -= lookups
        if self._lookups[number] > 0:
            return
        del self._lookups[number]
        with self._lock:
            self._images.pop(number, None)
            if number != ROOT_INODE and (node := self._nodes.pop(number, None)):
                self._numbers.pop(node, None)

    def open_images(self) -> int:
        """How many images have open layers: the served ones, and those that are held open."""
        with self._lock:
            return len({id(image.view) for image in self._image_numbers})
