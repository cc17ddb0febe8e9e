"""The nodes of the mounted tree: images and other files, their attributes and inode numbers."""

from __future__ import annotations

import errno
import json
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from diffmergefs.core.errors import os_error
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.access import Access

ROOT_INODE = 1
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

    #: The names of all its extended attributes.
    XATTRS: ClassVar = (_PREFIX + b"chain", _PREFIX + b"layers", _PREFIX + b"dirty_bytes")

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

    def xattr(self, root: str, name: bytes) -> bytes:
        """The value of the extended attribute `name`, one of XATTRS.

        `user.diffmergefs.chain` is a JSON list in ASCII: for each layer, base first, its `path`
        (relative paths are resolved against `root`) and its `data_bytes`. `.layers` is the number
        of layers and `.dirty_bytes` the number of data bytes in the newest one, both decimal. Reads
        no file. Raises OSError (E2BIG) if the value is longer than LONGEST_XATTR.
        """
        layers = self.view.layers
        if name == _PREFIX + b"layers":
            text = str(len(layers))
        elif name == _PREFIX + b"dirty_bytes":
            text = str(layers[-1].extents.data_bytes)
        else:
            facts = [(os.path.join(root, layer.path), layer.extents.data_bytes) for layer in layers]
            text = json.dumps([{"path": path, "data_bytes": size} for path, size in facts])
        value = text.encode("ascii")
        if len(value) > LONGEST_XATTR:
            raise os_error(errno.E2BIG, os.fsdecode(name))
        return value


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

    `number`, `node` and `open_images` are safe for several threads. `recorded` is called with each
    change of a number's lookups, its node (None if it is forgotten) and how many they are now.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: The next number. All below it may have been used.
        self.fresh = ROOT_INODE + 1
        self.recorded: Callable[[int, Node | None, int], None] | None = None
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
                number = self._image_numbers.get(node.image) or self._take()
                self._image_numbers[node.image] = number
                self._images[number] = node.image
            else:
                number = self._numbers.get(node) or self._take()
                self._numbers[node] = number
                self._nodes[number] = node
            return number

    def _take(self) -> int:
        self.fresh += 1
        return self.fresh - 1

    def known_number(self, node: Node) -> int | None:
        """The number by which the kernel knows the node now, or None."""
        with self._lock:
            if isinstance(node, MemoryFile):
                number = self._image_numbers.get(node.image)
            else:
                number = self._numbers.get(node)
        return number if number is not None and self.is_known(number) else None

    def restore(self, number: int, node: Node, lookups: int) -> None:
        """Give this node its number again, with the kernel's lookups of it.

        A `MemoryFile` keeps it as long as somebody holds its image.
        """
        with self._lock:
            if isinstance(node, MemoryFile):
                self._image_numbers[node.image] = number
                self._images[number] = node.image
            else:
                self._numbers[node] = number
                self._nodes[number] = node
            self.fresh = max(self.fresh, number + 1)
        self._lookups[number] = lookups

    def known(self) -> Iterator[tuple[int, Node, int]]:
        """Each number that the kernel knows, with its node and its lookups."""
        for number, lookups in self._lookups.items():
            if node := self._known(number):
                yield number, node, lookups

    def node(self, number: int) -> Node:
        """The node with this inode number.

        Raises OSError (ESTALE) if it was forgotten, or if it is an image that is neither served nor
        held open any more. The kernel then looks its name up again.
        """
        if (node := self._known(number)) is None:
            raise os_error(errno.ESTALE, f"inode {number}")
        return node

    def _known(self, number: int) -> Node | None:
        with self._lock:
            node = self._nodes.get(number)
            image = self._images.get(number)
        return node if image is None else MemoryFile(image)

    def look_up(self, number: int) -> None:
        """Count one lookup by the kernel, which it takes back with `forget`."""
        self._lookups[number] += 1
        if self.recorded is not None:
            self.recorded(number, self._known(number), self._lookups[number])

    def forget(self, number: int, lookups: int = 0) -> None:
        """Take back this many lookups, and drop the node if the kernel has no others."""
        self._lookups[number] -= lookups
        if lookups and self.recorded is not None:
            self.recorded(number, None, self._lookups[number])
        if self._lookups[number] > 0:
            return
        del self._lookups[number]
        with self._lock:
            self._images.pop(number, None)
            if number != ROOT_INODE and (node := self._nodes.pop(number, None)):
                self._numbers.pop(node, None)

    def is_known(self, number: int) -> bool:
        """Whether the kernel knows this number."""
        return number == ROOT_INODE or number in self._lookups

    def open_images(self) -> int:
        """How many images have open layers: the served ones, and those that are held open."""
        with self._lock:
            return len({id(image.view) for image in self._image_numbers})
