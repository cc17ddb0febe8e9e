"""The files beside the memory images, passed through or rewritten, and reached by descriptor."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace

from diffmergefs.core import beneath
from diffmergefs.core.errors import os_error
from diffmergefs.core.identity import file_bits
from diffmergefs.fuse.access import folder_bits, lineage, reachable, require_same
from diffmergefs.fuse.nodes import Attributes, Document, Passed, TagFolder
from diffmergefs.fuse.served import Store
from diffmergefs.opening.opener import require_spare_descriptors
from diffmergefs.stores.snapshot import DOCUMENT, Snapshot, is_left_out

_PASSED = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK})


class Passthrough:
    """What a mount of `store` at `mountpoint` shows of the store's other files and directories.

    All methods block. They raise OSError, ESTALE if another file is now at the path of a node: the
    kernel then looks the path up again.
    """

    def __init__(self, store: Store, mountpoint: str) -> None:
        self._store = store
        self._mountpoint = mountpoint

    # Directories

    def tag_folder(self, tag: str) -> TagFolder:
        """The directory of a tag."""
        with self.directory(self._snapshot(tag).folder or "") as fd:
            status = os.fstat(fd)
        return TagFolder(tag, status.st_dev, status.st_ino)

    def names(self, folder: TagFolder | Passed) -> set[str]:
        """The names in the directory, also of entries that are not passed through.

        For a tag they include its memory file and the files that its snapshot names.
        """
        with self.held(folder) as fd:
            if isinstance(folder, Passed):
                return set(_listed(fd))
            snapshot = self._snapshot(folder.tag)
            found = {os.path.basename(snapshot.layer.path), *snapshot.files}
            return found if snapshot.folder is None else found.union(_listed(fd))

    def child(self, folder: TagFolder | Passed, name: str) -> Document | Passed | None:
        """The entry `name` of the directory, or None if there is none that is passed through."""
        with self.held(folder) as fd:
            if isinstance(folder, Passed):
                return self._entry(fd, folder.path, name)
            snapshot = self._snapshot(folder.tag)
            if name == DOCUMENT and snapshot.document is not None:
                return self._document(fd, snapshot)
            if name in snapshot.files:
                return self._named_file(fd, snapshot, name)
            return None if snapshot.folder is None else self._entry(fd, snapshot.folder, name)

    @contextmanager
    def held(self, folder: TagFolder | Passed) -> Iterator[int]:
        """A descriptor of the very directory that the node stands for."""
        path = folder.path if isinstance(folder, Passed) else self._snapshot(folder.tag).folder
        with self.directory(path or "") as fd:
            require_same(os.fstat(fd), folder.device, folder.inode, path or "")
            yield fd

    def directory(self, path: str) -> AbstractContextManager[int]:
        """A descriptor of the directory that is now at `path` in the store."""
        return beneath.passing(self._store.roots, path)

    def _snapshot(self, tag: str) -> Snapshot:
        links = self._store.chain(tag)
        if links is None:
            raise os_error(errno.ENOENT, tag)
        return links[-1]

    def _entry(self, fd: int, folder: str, name: str) -> Passed | None:
        return None if is_left_out(name) else self._passed(fd, os.path.join(folder, name))

    def _named_file(self, fd: int, snapshot: Snapshot, name: str) -> Passed | None:
        # One of `snapshot.files`. The snapshot names it, so its name does not matter.
        path = snapshot.files[name]
        folder = os.path.dirname(path)
        if folder == (snapshot.folder or ""):
            return self._passed(fd, path)
        try:
            with self.directory(folder) as elsewhere:
                node = self._passed(elsewhere, path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return node and replace(node, elsewhere=True)

    def _passed(self, fd: int, path: str) -> Passed | None:
        # `fd` is the directory of `path`.
        catalog = self._store.seen.catalog
        if path in catalog.hidden:
            return None
        try:
            status = os.stat(os.path.basename(path), dir_fd=fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        kind = stat.S_IFMT(status.st_mode)
        # A layer may have another name too: a link, or a new one since the look.
        is_layer = kind == stat.S_IFREG and (status.st_dev, status.st_ino) in catalog.layer_files
        if kind not in _PASSED or is_layer:
            return None
        return Passed(path, status.st_dev, status.st_ino, kind)

    # Files

    def attributes(self, node: Passed | TagFolder | Document) -> Attributes:
        """The attributes of the node."""
        match node:
            case TagFolder():
                with self.held(node) as fd:
                    return mirrored_folder(fd)
            case Passed(path):
                return self._mirrored(path, node, elsewhere=node.elsewhere)
        return self._document_attributes(node)

    def attributes_of_open(self, node: Passed, fd: int) -> Attributes:
        """The attributes of a file through its open descriptor `fd`, wherever the file is now.

        Only its owner may open it anew.
        """
        status = os.fstat(fd)
        require_same(status, node.device, node.inode, node.path)
        return _mirror(status, file_bits(fd, status.st_mode) & 0o700)

    def open(self, node: Passed) -> int:
        """A read-only descriptor of the file.

        Raises FileAccessError too, and OSError (EBUSY) for device state that may belong to another
        memory image than the served one (`Look.require_seen`).
        """
        fd = beneath.open_regular(self._store.roots, node.path)
        try:
            require_spare_descriptors(fd, node.path)
            status = os.fstat(fd)
            require_same(status, node.device, node.inode, node.path)
            self._store.seen.require_seen(node.path, status)
        except OSError:
            os.close(fd)
            raise
        return fd

    def is_device_state(self, node: Passed) -> bool:
        """Whether the file belongs to exactly the memory image beside it."""
        return node.path in self._store.seen.device_state

    def link_target(self, node: Passed) -> str:
        """The target of a symlink, as it is stored."""
        folder, name = os.path.split(node.path)
        with self.directory(folder) as fd, self._pinned(fd, name, node) as link:
            return os.readlink("", dir_fd=link)

    def _mirrored(
        self, path: str, node: Passed | Document, *, elsewhere: bool = False
    ) -> Attributes:
        folder, name = os.path.split(path)
        with self.directory(folder) as fd, self._pinned(fd, name, node) as file:
            status = os.fstat(file)
            bits = file_bits(f"/proc/self/fd/{file}", status.st_mode)
            if elsewhere:  # it has other directories above it than its place in the mount
                bits &= reachable(lineage(fd), status.st_uid, status.st_gid)
            return _mirror(status, bits)

    @contextmanager
    def _pinned(self, folder: int, name: str, node: Passed | Document) -> Iterator[int]:
        # The node's own file, opened with O_PATH by its name in the directory `folder`.
        with beneath.closing_fd(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=folder)) as fd:
            status = os.fstat(fd)
            require_same(status, node.device, node.inode, name)
            if isinstance(node, Passed):
                self._store.seen.require_seen(node.path, status)
            yield fd

    # Rewritten documents

    def content(self, node: Document) -> bytes:
        """The text of a tag's document. Raises OSError (ESTALE) if the text has changed."""
        # Made anew each time, because the kernel remembers nodes for days.
        snapshot = self._snapshot(node.tag)
        content = rewritten(snapshot, self._mountpoint)
        read = snapshot.document_status
        is_same = read is not None and (read.st_dev, read.st_ino) == (node.device, node.inode)
        if not is_same or hashlib.sha256(content).digest() != node.digest:
            raise os_error(errno.ESTALE, node.tag)
        return content

    def _document(self, fd: int, snapshot: Snapshot) -> Document | None:
        # Serve what the last look read, until the next look reads the present file in `fd`.
        read = snapshot.document_status
        if read is None:
            return None
        replaced = True
        with suppress(FileNotFoundError):
            found = os.stat(DOCUMENT, dir_fd=fd, follow_symlinks=False)
            replaced = not os.path.samestat(found, read)
        content = rewritten(snapshot, self._mountpoint)
        digest = hashlib.sha256(content).digest()
        device, inode = read.st_dev, read.st_ino
        return Document(snapshot.tag, len(content), digest, device, inode, replaced)

    def _document_attributes(self, node: Document) -> Attributes:
        snapshot = self._snapshot(node.tag)
        path = os.path.join(snapshot.folder or "", DOCUMENT)
        read = snapshot.document_status
        if read is None:
            raise os_error(errno.ENOENT, path)
        require_same(read, node.device, node.inode, path)
        # If the file that was read has gone, nothing tells whether other users could reach it.
        found = _mirror(read, read.st_mode & 0o700)
        if not node.replaced:
            with suppress(OSError):
                found = self._mirrored(path, node)
        return found._replace(size=node.size, blocks=-(-node.size // 512))


def rewritten(snapshot: Snapshot, mountpoint: str) -> bytes:
    """The snapshot's document, for a mount at `mountpoint`: it describes a base in the mount.

    A forkd that reads it spawns the snapshot without assembling or hashing anything.
    """
    document = dict(snapshot.document or {})
    document.pop("parent_tag", None)
    document.pop("parent_content_hash", None)
    folder = os.path.join(mountpoint, snapshot.tag)
    document["memory"] = os.path.join(folder, os.path.basename(snapshot.layer.path))
    if snapshot.vmstate is not None:
        document["vmstate"] = os.path.join(folder, snapshot.vmstate)
    return json.dumps(document, indent=2).encode() + b"\n"


def mirrored_folder(fd: int) -> Attributes:
    """The attributes that the mount shows for the directory `fd`."""
    return _mirror(os.fstat(fd), folder_bits(fd))


def _listed(fd: int) -> list[str]:
    # `fd` may be open with O_PATH only.
    with beneath.closing_fd(os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)) as folder:
        return os.listdir(folder)


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
