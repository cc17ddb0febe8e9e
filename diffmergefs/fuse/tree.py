"""The mounted tree: the names in each directory and the attributes of each node.

It knows nothing of FUSE. Everything that touches files blocks, so call it in worker threads.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

from diffmergefs.core import STATUS_FOLDER, beneath
from diffmergefs.core.errors import DiffMergeError, os_error
from diffmergefs.fuse.access import LISTING, reachable, view_access
from diffmergefs.fuse.nodes import (
    Attributes,
    Document,
    Inodes,
    MemoryFile,
    Node,
    OpenImage,
    Passed,
    Root,
    StatusFile,
    StatusFolder,
    TagFolder,
)
from diffmergefs.fuse.passthrough import Passthrough, mirrored_folder
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.status import METRICS_FILE, STATUS_FILE


class Tree:
    """The nodes below a mountpoint.

    It serves a `store`, or with `explicit` one image under its name. `mountpoint` is the absolute
    path for rewritten documents. With `open_rw`, everyone who may read a memory file may also open
    it for writing (the adapter refuses the writes themselves).
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
        self.inodes = Inodes()
        self._passthrough = None if store is None else Passthrough(store, mountpoint)
        self._mountpoint = mountpoint
        self._open_rw = open_rw
        self._last_root: Attributes | None = None
        self._began_ns = time.time_ns()

    @property
    def passthrough(self) -> Passthrough:
        """The files beside the images. Only a tree of a store has any."""
        assert self._passthrough is not None
        return self._passthrough

    # Names

    def names(self, folder: Node) -> tuple[bytes, ...]:
        """The names in a directory, in order.

        Some of them may be unknown to `child`: what is not passed through, and the memory file of
        an image that is refused or not open. Raises OSError, ESTALE if another directory is now at
        its path.
        """
        return tuple(sorted(os.fsencode(name) for name in self._names(folder)))

    def _names(self, folder: Node) -> Iterable[str]:
        match folder:
            case Root():
                if self.explicit:
                    return [self.explicit.name]
                return self.store.tags() if self.store else []
            case TagFolder() | Passed(kind=stat.S_IFDIR):
                return self.passthrough.names(folder)
            case StatusFolder():
                return METRICS_FILE, STATUS_FILE
        raise os_error(errno.ENOTDIR)

    def entries(self, folder: Node, names: Sequence[bytes]) -> list[tuple[Node, Attributes] | None]:
        """The entries of these names with their attributes; None for one that cannot be shown.

        Raises OSError like `names`.
        """
        if isinstance(folder, TagFolder | Passed):
            with self.passthrough.held(folder):
                pass  # raises an error of the directory itself
        return [self._entry(folder, os.fsdecode(name)) for name in names]

    def _entry(self, folder: Node, name: str) -> tuple[Node, Attributes] | None:
        with suppress(OSError, DiffMergeError):
            node = self.child(folder, name)
            return node, self.attributes(node)
        return None

    def child(self, folder: Node, name: str) -> Node:
        """The entry `name` of a directory.

        Raises FileNotFoundError, also for a memory file whose image is not open, DiffMergeError for
        an image that was refused, and OSError (ESTALE) if another directory is now at its path.
        """
        found: Node | None
        match folder:
            case Root():
                found = self._root_child(name)
            case TagFolder(tag) if name == self.memory_name(tag):
                image = self.store.opened(tag) if self.store else None
                found = None if image is None else MemoryFile(image)
            case TagFolder() | Passed(kind=stat.S_IFDIR):
                found = self.passthrough.child(folder, name)
            case StatusFolder():
                found = StatusFile(name) if name in (METRICS_FILE, STATUS_FILE) else None
            case _:
                raise os_error(errno.ENOTDIR)
        if found is None:
            raise os_error(errno.ENOENT, name)
        return found

    def _root_child(self, name: str) -> Node | None:
        if self.explicit and name == self.explicit.name:
            return MemoryFile(self.explicit)
        if self.store and self.store.chain(name):
            return self.passthrough.tag_folder(name)
        # Not among the names: `cp -r` and a scan of the directory do not meet it.
        return StatusFolder() if name == STATUS_FOLDER else None

    def memory_name(self, tag: str) -> str | None:
        """The name of the tag's memory file, or None if the tag is not served."""
        links = self.store.chain(tag) if self.store else None
        return os.path.basename(links[-1].layer.path) if links else None

    # Images

    def path_of(self, image: OpenImage) -> str | None:
        """The path of the image below the mountpoint, or None if it is no longer served."""
        if image is self.explicit:
            return os.path.join(self._mountpoint, image.name)
        tag = self.store.tag_of(image) if self.store else None
        return None if tag is None else os.path.join(self._mountpoint, tag, image.name)

    def is_served(self, image: OpenImage) -> bool:
        """Whether this very image is the one that is served now. Never blocks."""
        if self.store is None:
            return image is self.explicit
        with suppress(DiffMergeError):
            return self.store.opened(image.tag) is image
        return False

    def require_same_access(self, image: OpenImage) -> None:
        """Raise OSError (ESTALE) if the image's mode admits users who may not read its layers.

        Needed when somebody opens an image that is no longer served, by a file handle or a link in
        /proc: its mode is that of the time when it was served.
        """
        now = view_access(image.view.layers)
        if now[:2] != image.access[:2] or image.access.mode & ~now.mode:
            raise os_error(errno.ESTALE, image.name)

    def totals(self) -> tuple[int, int]:
        """The sum of the logical sizes of all served images, and their number."""
        if self.store is not None:
            return self.store.total_bytes(), len(self.store.tags())
        return self.explicit.view.size if self.explicit else 0, 1

    # Attributes

    def attributes(self, node: Node) -> Attributes:
        """The attributes of the node.

        Raises OSError if its file is gone, ESTALE if another file is now at its path.
        """
        match node:
            case MemoryFile(image):
                return self._memory_attributes(image)
            case Document() | Passed() | TagFolder():
                return self.passthrough.attributes(node)
            case StatusFolder():
                return self._status_attributes(stat.S_IFDIR | 0o500, 2)
            case StatusFile():
                return self._status_attributes(stat.S_IFREG | 0o400, 1)
        return self._root_attributes()

    def _status_attributes(self, mode: int, nlink: int) -> Attributes:
        # Only the daemon's user may read them. Their size is 0, as in /proc.
        return Attributes(mode, os.geteuid(), os.getegid(), 0, 0, nlink, self._began_ns)

    def _memory_attributes(self, image: OpenImage) -> Attributes:
        uid, gid, mode = image.access
        if self._open_rw:
            mode |= (mode & 0o444) >> 1
        return Attributes(
            stat.S_IFREG | mode,
            uid,
            gid,
            image.view.size,
            -(-image.visible // 512),
            1,
            image.mtime_ns,
            constant=True,
        )

    def _root_attributes(self) -> Attributes:
        # If the directory was deleted, the last known attributes stay: the mountpoint does not
        # vanish, and nothing in the directory could be reached any more.
        try:
            self._last_root = self._read_root_attributes()
        except OSError:
            if self._last_root is None:
                raise
        return self._last_root

    def _read_root_attributes(self) -> Attributes:
        if self.store:
            with self.passthrough.directory("") as fd:
                found = mirrored_folder(fd)
            if found.nlink == 0:
                raise os_error(errno.ENOENT, self.store.root)
            # A tag's name may reveal directories between the root and its own.
            listing = reachable(self.store.seen.named, found.uid, found.gid, LISTING)
            return found._replace(mode=found.mode & ~(0o444 & ~listing))
        assert self.explicit is not None
        base = self.explicit.view.layers[0]
        folder = os.path.dirname(os.readlink(f"/proc/self/fd/{base.fd}"))
        with beneath.passing(None, folder) as fd:
            return mirrored_folder(fd)
