"""The mounted tree: which names stand where, with which attributes. Knows nothing of FUSE.

Everything that touches files blocks; the adapter calls it in worker threads.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import stat
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from diffmergefs.core import beneath
from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.names import STATUS_FOLDER
from diffmergefs.core.permissions import file_bits
from diffmergefs.fuse.access import (
    LISTING,
    folder_bits,
    lineage,
    reachable,
    require_same,
    view_access,
)
from diffmergefs.fuse.image import OpenImage
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.status import METRICS_FILE, STATUS_FILE
from diffmergefs.opening.opener import require_spare_descriptors
from diffmergefs.stores.snapshot import DOCUMENT, Snapshot, is_left_out

ROOT_INODE = 1
_PASSED = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK})


@dataclass(frozen=True)
class Root:
    """The mount's own directory."""


@dataclass(frozen=True)
class TagFolder:
    """The directory of one tag: which one, where the tag has one of its own, or else SOURCE."""

    tag: str
    device: int
    inode: int


@dataclass(frozen=True)
class MemoryFile:
    """A merged memory file. Another image of the same tag is another file."""

    shown: OpenImage


@dataclass(frozen=True)
class Document:
    """A tag's rewritten snapshot.json: its size and sha256, and which file was read for it.

    One that is `replaced` does not stand in the tag's directory any more.
    """

    tag: str
    size: int
    digest: bytes
    device: int
    inode: int
    replaced: bool = False


@dataclass(frozen=True)
class Passed:
    """A file, directory or symlink of SOURCE that is passed through, by its path beneath it.

    One that is `elsewhere` is shown in another directory than its own.
    """

    path: str
    device: int
    inode: int
    kind: int
    elsewhere: bool = False


@dataclass(frozen=True)
class StatusFolder:
    """The directory in the root that no listing has, with what the mount says of itself."""


@dataclass(frozen=True)
class StatusFile:
    """One file of it, whose content is made when it is opened."""

    name: str


Node = Root | TagFolder | MemoryFile | Document | Passed | StatusFolder | StatusFile


class Attributes(NamedTuple):
    """What stat(2) says of a node; `blocks` of 512 bytes. `constant` ones never change."""

    mode: int
    uid: int
    gid: int
    size: int
    blocks: int
    nlink: int
    mtime_ns: int
    constant: bool = False


class Tree:
    """The nodes below a mountpoint and their inode numbers, which are never used twice.

    Shows a `store`, or with `explicit` one image under its name. `mountpoint` is the absolute path
    that rewritten documents point into. With `open_rw` whoever may read a memory file may also
    open it for writing (writes themselves are the adapter's to refuse).
    """

    def __init__(
        self,
        mountpoint: str,
        store: Store | None = None,
        explicit: OpenImage | None = None,
        *,
        open_rw: bool = False,
    ) -> None:
        self.store = store
        self.explicit = explicit
        self._mountpoint = mountpoint
        self._open_rw = open_rw
        self._lock = threading.Lock()
        self._fresh = itertools.count(ROOT_INODE + 1)
        self._nodes: dict[int, Node] = {ROOT_INODE: Root()}
        self._inodes: dict[Node, int] = {Root(): ROOT_INODE}
        # An image lives as long as it is shown or a file of it is open, and its number as long as
        # the image, whatever the kernel forgets in between. That the kernel remembers a name, which
        # it may do for days, must not hold layers open: deleted ones would take their space.
        self._images: weakref.WeakValueDictionary[int, OpenImage] = weakref.WeakValueDictionary()
        self._image_inodes: weakref.WeakKeyDictionary[OpenImage, int] = weakref.WeakKeyDictionary()
        self._last_root: Attributes | None = None
        self._began_ns = time.time_ns()

    def inode(self, node: Node) -> int:
        """The node's inode number, a new one if it has none yet."""
        with self._lock:
            if isinstance(node, MemoryFile):
                inode = self._image_inodes.get(node.shown) or next(self._fresh)
                self._image_inodes[node.shown] = inode
                self._images[inode] = node.shown
            else:
                inode = self._inodes.get(node) or next(self._fresh)
                self._inodes[node] = inode
                self._nodes[inode] = node
            return inode

    def node(self, inode: int) -> Node:
        """The node with this inode number.

        Raises OSError (ESTALE) if it was forgotten, or is an image that is neither shown nor held
        open any more: the kernel then looks its name up again.
        """
        with self._lock:
            node = self._nodes.get(inode)
            shown = self._images.get(inode)
        if node is not None:
            return node
        if shown is not None:
            return MemoryFile(shown)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), f"inode {inode}")

    def forget(self, inode: int) -> None:
        """Drop a node to which the kernel holds no reference."""
        with self._lock:
            self._images.pop(inode, None)
            if inode != ROOT_INODE and (node := self._nodes.pop(inode, None)):
                self._inodes.pop(node, None)

    def names(self, folder: Node) -> tuple[bytes, ...]:
        """The names in a directory, in order.

        Among them are some that `child` does not know: what is not passed through, and the memory
        file of an image that is refused or not open. Raises OSError, ESTALE where another directory
        stands there by now.
        """
        return tuple(sorted(os.fsencode(name) for name in self._names(folder)))

    def _names(self, folder: Node) -> Iterable[str]:
        match folder:
            case Root():
                if self.explicit:
                    return [self.explicit.name]
                return self.store.tags() if self.store else []
            case TagFolder(tag):
                snapshot = self._snapshot(tag)
                found = {os.path.basename(snapshot.layer.path), *snapshot.files}
                with self._held(folder) as fd:
                    return found if snapshot.folder is None else found.union(_listed(fd))
            case Passed(kind=stat.S_IFDIR):
                with self._held(folder) as fd:
                    return _listed(fd)
            case StatusFolder():
                return METRICS_FILE, STATUS_FILE
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def children(self, folder: Node, names: Iterable[str] | None = None) -> dict[str, Node]:
        """The entries of a directory by name, or those of them that `names` names.

        A name that `child` does not know, or cannot look at, is left out: it hides no other. Raises
        OSError like `names`.
        """
        found: dict[str, Node] = {}
        if names is None:
            names = map(os.fsdecode, self.names(folder))
        elif isinstance(folder, TagFolder | Passed):
            with self._held(folder):
                pass  # an error of the directory itself
        for name in names:
            with suppress(OSError, DiffMergeError):
                found[name] = self.child(folder, name)
        return found

    def child(self, folder: Node, name: str) -> Node:
        """The entry `name` of a directory.

        Raises FileNotFoundError, also for a memory file whose image is not open, DiffMergeError for
        one that was refused, and OSError (ESTALE) where another directory stands there by now.
        """
        found: Node | None
        match folder:
            case Root():
                found = self._root_child(name)
            case TagFolder():
                found = self._tag_child(folder, name)
            case Passed(path, kind=stat.S_IFDIR):
                with self._held(folder) as fd:
                    found = self._passed(fd, path, name)
            case StatusFolder():
                found = StatusFile(name) if name in (METRICS_FILE, STATUS_FILE) else None
            case _:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if found is None:
            raise _missing(name)
        return found

    def _root_child(self, name: str) -> Node | None:
        found: Node | None = None
        if self.explicit and name == self.explicit.name:
            found = MemoryFile(self.explicit)
        elif self.store and self.store.chain(name):
            found = self._tag_folder(name)
        if found is None and name == STATUS_FOLDER:
            # Not among the children: neither cp -r nor a scan of the directory meets it.
            return StatusFolder()
        return found

    def _tag_folder(self, tag: str) -> TagFolder:
        with self._passing(self._snapshot(tag).folder or "") as fd:
            status = os.fstat(fd)
        return TagFolder(tag, status.st_dev, status.st_ino)

    def _tag_child(self, folder: TagFolder, name: str) -> Node | None:
        assert self.store is not None
        snapshot = self._snapshot(folder.tag)
        if name == os.path.basename(snapshot.layer.path):
            shown = self.store.opened(folder.tag)
            return None if shown is None else MemoryFile(shown)
        with self._held(folder) as fd:
            if name == DOCUMENT and snapshot.document is not None:
                return self._document(fd, snapshot)
            if name in snapshot.files:
                return self._passed_along(fd, snapshot, name)
            return None if snapshot.folder is None else self._passed(fd, snapshot.folder, name)

    @contextmanager
    def _held(self, folder: TagFolder | Passed) -> Iterator[int]:
        # The directory that the node stands for, whatever its name leads to by now.
        path = folder.path if isinstance(folder, Passed) else self._folder_path(folder)
        with self._passing(path) as fd:
            require_same(os.fstat(fd), folder.device, folder.inode, path)
            yield fd

    def _folder_path(self, folder: TagFolder) -> str:
        return self._snapshot(folder.tag).folder or ""

    def _passing(self, path: str) -> AbstractContextManager[int]:
        assert self.store is not None
        return beneath.passing(self.store.roots, path)

    def memory_name(self, tag: str) -> str | None:
        """The name of the tag's memory file, or None if the tag is not shown."""
        links = self.store.chain(tag) if self.store else None
        return os.path.basename(links[-1].layer.path) if links else None

    def path_of(self, shown: OpenImage) -> str | None:
        """Where the image stands below the mountpoint, or None if it is not shown any more."""
        if shown is self.explicit:
            return os.path.join(self._mountpoint, shown.name)
        tag = self.store.tag_of(shown) if self.store else None
        return None if tag is None else os.path.join(self._mountpoint, tag, shown.name)

    def is_shown(self, shown: OpenImage) -> bool:
        """Whether this very image is the one that is shown now. Never blocks."""
        if self.store is None:
            return shown is self.explicit
        with suppress(DiffMergeError):
            return self.store.opened(shown.tag) is shown
        return False

    def require_same_access(self, shown: OpenImage) -> None:
        """Raise OSError (ESTALE) if whoever may read the image by its mode may not read its layers.

        That is asked of one that is not shown any more, and that somebody opens anew by a handle
        or a link in /proc: its mode is that of the day when it was shown.
        """
        now = view_access(shown.view.layers)
        if now[:2] != shown.access[:2] or shown.access.mode & ~now.mode:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), shown.name)

    def _snapshot(self, tag: str) -> Snapshot:
        links = self.store.chain(tag) if self.store else None
        if links is None:
            raise _missing(tag)
        return links[-1]

    def _rewritten(self, snapshot: Snapshot) -> bytes:
        # The tag reads as a base that lies in the mountpoint: a forkd that is pointed there spawns
        # it without assembling or hashing anything.
        document = dict(snapshot.document or {})
        document.pop("parent_tag", None)
        document.pop("parent_content_hash", None)
        folder = os.path.join(self._mountpoint, snapshot.tag)
        document["memory"] = os.path.join(folder, os.path.basename(snapshot.layer.path))
        if snapshot.vmstate is not None:
            document["vmstate"] = os.path.join(folder, snapshot.vmstate)
        return json.dumps(document, indent=2).encode() + b"\n"

    def _document(self, fd: int, snapshot: Snapshot) -> Document | None:
        # What was read, until the next look reads what stands in the directory `fd` by now.
        read = snapshot.document_status
        if read is None:
            return None
        replaced = True
        with suppress(FileNotFoundError):
            found = os.stat(DOCUMENT, dir_fd=fd, follow_symlinks=False)
            replaced = not os.path.samestat(found, read)
        content = self._rewritten(snapshot)
        digest = hashlib.sha256(content).digest()
        device, inode = read.st_dev, read.st_ino
        return Document(snapshot.tag, len(content), digest, device, inode, replaced)

    def content(self, node: Document) -> bytes:
        """The text of a tag's document. Raises OSError, ESTALE if it is another one by now."""
        # Made anew each time: the kernel remembers nodes for days.
        snapshot = self._snapshot(node.tag)
        content = self._rewritten(snapshot)
        read = snapshot.document_status
        is_same = read is not None and (read.st_dev, read.st_ino) == (node.device, node.inode)
        if not is_same or hashlib.sha256(content).digest() != node.digest:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), node.tag)
        return content

    def _document_attributes(self, node: Document) -> Attributes:
        snapshot = self._snapshot(node.tag)
        path = os.path.join(snapshot.folder or "", DOCUMENT)
        read = snapshot.document_status
        if read is None:
            raise _missing(path)
        require_same(read, node.device, node.inode, path)
        # Whether others could reach the very file that was read is not known if it has gone.
        found = _mirror(read, read.st_mode & 0o700)
        if not node.replaced:
            with suppress(OSError):
                found = self._mirrored(path, node)
        return found._replace(size=node.size, blocks=-(-node.size // 512))

    def _passed(self, fd: int, folder: str, name: str) -> Passed | None:
        return None if is_left_out(name) else self._passed_if_fit(fd, os.path.join(folder, name))

    def _passed_along(self, fd: int, snapshot: Snapshot, name: str) -> Passed | None:
        # One of `snapshot.files`, whatever it is called: the snapshot names it.
        path = snapshot.files[name]
        folder = os.path.dirname(path)
        if folder == (snapshot.folder or ""):
            return self._passed_if_fit(fd, path)
        try:
            with self._passing(folder) as elsewhere:
                node = self._passed_if_fit(elsewhere, path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return node and replace(node, elsewhere=True)

    def _passed_if_fit(self, fd: int, path: str) -> Passed | None:
        # `fd` is the directory in which `path` stands.
        assert self.store is not None
        if self.store.is_hidden(path):
            return None
        try:
            status = os.stat(os.path.basename(path), dir_fd=fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        kind = stat.S_IFMT(status.st_mode)
        if kind not in _PASSED or (kind == stat.S_IFREG and self.store.is_layer(status)):
            return None
        return Passed(path, status.st_dev, status.st_ino, kind)

    def attributes(self, node: Node) -> Attributes:
        """What stat says of the node.

        Raises OSError if its file is gone, ESTALE where another one stands at its path by now: its
        attributes are not those of the node.
        """
        match node:
            case MemoryFile(shown):
                return self._memory_attributes(shown)
            case Document():
                return self._document_attributes(node)
            case Passed(path):
                return self._mirrored(path, node, elsewhere=node.elsewhere)
            case TagFolder():
                with self._held(node) as fd:
                    return _mirror_folder(fd)
            case StatusFolder():
                return self._own(stat.S_IFDIR | 0o500, 2)
            case StatusFile():
                return self._own(stat.S_IFREG | 0o400, 1)
        return self._root_attributes()

    def _own(self, mode: int, nlink: int) -> Attributes:
        # Of what the mount itself says, to its owner; of no size, as in /proc.
        return Attributes(mode, os.geteuid(), os.getegid(), 0, 0, nlink, self._began_ns)

    def open_images(self) -> int:
        """How many images have their layers open: those that are shown, and those held open."""
        with self._lock:
            return len({id(shown.view) for shown in self._image_inodes})

    def _root_attributes(self) -> Attributes:
        # Those last known where the directory was deleted: the mountpoint does not vanish, and what
        # lies in it could not be reached any more.
        try:
            self._last_root = self._read_root_attributes()
        except OSError:
            if self._last_root is None:
                raise
        return self._last_root

    def _read_root_attributes(self) -> Attributes:
        if self.store:
            with self._passing("") as fd:
                found = _mirror_folder(fd)
            if found.nlink == 0:
                raise _missing(self.store.root)
            # A tag's name may tell of directories between the root and its own.
            listing = reachable(self.store.named, found.uid, found.gid, LISTING)
            return found._replace(mode=found.mode & ~(0o444 & ~listing))
        assert self.explicit is not None
        base = self.explicit.view.layers[0]
        folder = os.path.dirname(os.readlink(f"/proc/self/fd/{base.fd}"))
        with beneath.passing(None, folder) as fd:
            return _mirror_folder(fd)

    def _memory_attributes(self, shown: OpenImage) -> Attributes:
        uid, gid, mode = shown.access
        if self._open_rw:
            mode |= (mode & 0o444) >> 1
        return Attributes(
            stat.S_IFREG | mode,
            uid,
            gid,
            shown.view.size,
            -(-shown.visible // 512),
            1,
            shown.mtime_ns,
            constant=True,
        )

    def _mirrored(
        self, path: str, node: Passed | Document, *, elsewhere: bool = False
    ) -> Attributes:
        folder, name = os.path.split(path)
        with self._passing(folder) as fd, self._handle(fd, name, node) as handle:
            status = os.fstat(handle)
            bits = file_bits(f"/proc/self/fd/{handle}", status.st_mode)
            if elsewhere:  # the directories above it are not those of the view
                bits &= reachable(lineage(fd), status.st_uid, status.st_gid)
            return _mirror(status, bits)

    def attributes_of_open(self, node: Passed, fd: int) -> Attributes:
        """What stat says of a passed-through file that `fd` is open of, wherever it lies by now.

        Nobody but its owner comes in anew. Raises OSError, ESTALE if `fd` is another file.
        """
        status = os.fstat(fd)
        require_same(status, node.device, node.inode, node.path)
        return _mirror(status, file_bits(fd, status.st_mode) & 0o700)

    @contextmanager
    def _handle(self, folder: int, name: str, node: Passed | Document) -> Iterator[int]:
        # The node's own file, opened by its name in the directory `folder` with O_PATH.
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            status = os.fstat(fd)
            require_same(status, node.device, node.inode, name)
            if isinstance(node, Passed) and self.store is not None:
                self.store.require_seen(node.path, status)
            yield fd
        finally:
            os.close(fd)

    def open_passed(self, node: Passed) -> int:
        """A read-only descriptor of a passed-through file. Raises OSError, FileAccessError.

        ESTALE where another file stands at its path by now: the kernel then looks it up again.
        EBUSY for device state that may be of another memory than is shown (`Store.require_seen`).
        """
        assert self.store is not None
        fd = beneath.open_regular(self.store.roots, node.path)
        try:
            require_spare_descriptors(fd, node.path)
            status = os.fstat(fd)
            require_same(status, node.device, node.inode, node.path)
            self.store.require_seen(node.path, status)
        except OSError:
            os.close(fd)
            raise
        return fd

    def is_device_state(self, node: Passed) -> bool:
        """Whether the file belongs to the very memory beside it."""
        return self.store is not None and self.store.is_device_state(node.path)

    def link_target(self, node: Passed) -> str:
        """Where a passed-through symlink points, as it is stored.

        Raises OSError, ESTALE where another one stands at its path by now.
        """
        folder, name = os.path.split(node.path)
        with self._passing(folder) as fd, self._handle(fd, name, node) as handle:
            return os.readlink("", dir_fd=handle)


def _missing(name: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def _listed(fd: int) -> list[str]:
    # The names in the directory `fd`, which may be open with O_PATH only.
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    try:
        return os.listdir(folder)
    finally:
        os.close(folder)


def _mirror_folder(fd: int) -> Attributes:
    return _mirror(os.fstat(fd), folder_bits(fd))


def _mirror(status: os.stat_result, bits: int) -> Attributes:
    return Attributes(
        stat.S_IFMT(status.st_mode) | bits,
        status.st_uid,
        status.st_gid,
        status.st_size,
        status.st_blocks,
        status.st_nlink,
        status.st_mtime_ns,
    )
