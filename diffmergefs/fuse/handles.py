"""Open files and directories of a mount: their shared contents, and who observes them."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from diffmergefs.core import sparse
from diffmergefs.core.errors import os_error
from diffmergefs.core.identity import FileKey
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.nodes import Node, OpenImage, Passed, lane_of
from diffmergefs.fuse.passthrough import Passthrough

MAX_BYTES = 64 << 20
_OVERHEAD = 48  # bytes that Python takes for a part besides its own


@dataclass(eq=False, slots=True, weakref_slot=True)
class Content:
    """The names in a directory, in the order in which they are read, or one text."""

    parts: tuple[bytes, ...]


class Contents:
    """The contents that are in use. Not safe for several threads.

    Together they take at most `limit` bytes, however many are open and however often they change.
    Only the first one may be larger.
    """

    def __init__(self, limit: int = MAX_BYTES) -> None:
        self._limit = limit
        self._taken = 0
        self._newest: weakref.WeakValueDictionary[Hashable, Content] = weakref.WeakValueDictionary()

    def shared(self, of: Hashable, *parts: bytes) -> Content:
        """A content of these parts: the one in use, or a new one that counts while it lives.

        `of` identifies what is read. Raises OSError (ENFILE) if there is no room for a new one.
        """
        known = self._newest.get(of)
        if known is not None and known.parts == parts:
            return known
        size = sum(map(len, parts)) + _OVERHEAD * len(parts)
        if self._taken and self._taken + size > self._limit:
            raise os_error(errno.ENFILE)
        content = self._newest[of] = Content(parts)
        self._taken += size
        weakref.finalize(content, self._give_back, size)
        return content

    def _give_back(self, size: int) -> None:
        self._taken -= size


@dataclass(eq=False, slots=True)
class Handle:
    """An open file or directory. It reads from exactly one of `image`, `fd`, `text` and `names`.

    With none of them, what it read from was lost with the server that opened it. `fd` is a
    descriptor of the passed-through file `node`; `names` are those in the directory
    `node`. With a `key`, the file behind `fd` must keep that identity. `mark` is that of reads of
    the image's first page, and `supplied` counts the bytes that each layer supplied to reads.
    """

    image: OpenImage | None = None
    fd: int | None = None
    text: Content | None = None
    names: Content | None = None
    node: Node | None = None
    key: FileKey | None = None
    mark: int = 0
    supplied: dict[int, int] = field(default_factory=dict)
    view: MergedView | None = field(init=False)
    _devices: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.view = self.image.view if self.image else None
        self._devices = [layer.status.st_dev for layer in self.view.layers] if self.view else []

    @property
    def device(self) -> int:
        """The filesystem (st_dev) of the passed-through file; 0 if it is none."""
        return self.node.device if isinstance(self.node, Passed) else 0

    @classmethod
    def of_file(cls, files: Passthrough, node: Passed) -> Handle:
        """Open a passed-through file; blocks, and raises what `Passthrough.open` does."""
        fd = files.open(node)
        key = FileKey.of(os.fstat(fd)) if files.is_device_state(node) else None
        return cls(fd=fd, node=node, key=key)

    def lane(self, start: int, length: int) -> Hashable:
        """The lane of the filesystems that hold the bytes in this range: see `threads.Lanes`."""
        if self.view is None:
            return lane_of(self.device)
        numbers = {segment.layer for segment in self.view.segments(start, length)}
        return lane_of(*(self._devices[number] for number in numbers if number is not None))

    def read_file(self, offset: int, size: int) -> bytes:
        """Read from the passed-through file; blocks. Short only at the file's present end.

        Raises OSError, EIO if the file is no longer the one that `key` identifies.
        """
        assert self.fd is not None
        buffer = bytearray(size)
        count = sparse.read_into(self.fd, memoryview(buffer), offset)
        if self.key is not None and FileKey.of(os.fstat(self.fd)) != self.key:
            path = os.readlink(f"/proc/self/fd/{self.fd}")
            reason = "overwritten while it was open, as device state must not be"
            raise OSError(errno.EIO, reason, path)
        return bytes(buffer[:count])


class Handles:
    """All open files and directories of a mount. Their numbers are never reused.

    `recorded` is called with the number of each handle that is added, and the handle, and with None
    for one that is removed.
    """

    def __init__(self) -> None:
        self.by_number: dict[int, Handle] = {}
        self.recorded: Callable[[int, Handle | None], None] | None = None
        self._contents = Contents()
        self.shared = self._contents.shared
        self._next = 1

    def begin_at(self, number: int) -> None:
        """Use numbers from this one on."""
        self._next = number

    def add(self, handle: Handle) -> int:
        """Give the handle a number."""
        number = self._next
        self._next += 1
        self.by_number[number] = handle
        if self.recorded is not None:
            self.recorded(number, handle)
        return number

    def remove(self, number: int) -> Handle | None:
        """Forget the handle with this number, and return it. None if there is none."""
        handle = self.by_number.pop(number, None)
        if handle is not None and self.recorded is not None:
            self.recorded(number, None)
        return handle

    def add_text(self, node: Node, text: bytes) -> int:
        """Add a handle that reads this text of a file. Raises OSError like `Contents.shared`."""
        return self.add(Handle(text=self._contents.shared(node, text), node=node))

    def add_folder(self, node: Node, names: tuple[bytes, ...]) -> int:
        """Add a handle of a directory with these names. Raises OSError like `Contents.shared`."""
        return self.add(Handle(names=self._contents.shared(node, *names), node=node))

    def open_files(self) -> int:
        """How many files are open or mapped. Directories do not count."""
        return sum(1 for handle in self.by_number.values() if handle.names is None)

    def images(self) -> list[OpenImage]:
        """The image of each open memory file."""
        return [handle.image for handle in self.by_number.values() if handle.image]

    def descriptor_of(self, node: Node) -> int | None:
        """A descriptor of this passed-through file if it is open."""
        held = (h.fd for h in self.by_number.values() if h.fd is not None and h.node == node)
        return next(held, None)


@dataclass(frozen=True)
class ObservedMount:
    """What an observer may use of the mount that it observes.

    `device` is the device number of the mount (`major:minor`), or None if the mount table cannot
    be read. `path_of` returns the path of an image in the mount, or None if the mount no longer
    shows it. `store_pages(inode, offset, data)` puts data into the page cache of a mounted file. It
    waits for pages that a client is waiting for, so never call it in the event loop. `abort` ends
    the connection to the kernel. `is_guarded` tells whether somebody would answer those clients, or
    end the connection, if this process died now.
    """

    device: str | None
    path_of: Callable[[OpenImage], str | None]
    store_pages: Callable[[int, int, bytes], None]
    abort: Callable[[], None]
    is_guarded: Callable[[], bool]


class Observer:
    """Receives the events of memory files: opens, reads and closes. This one does nothing.

    The methods are called in the event loop and must not block, except `stop` and `close`. `file`
    is the number of an open file and is never reused. `pushed_bytes` counts the bytes that were
    prefetched into the page cache, and `hit_bytes` those of them that no reader had to request: see
    `Prefetcher`.
    """

    pushed_bytes = hit_bytes = 0

    def opened(self, file: int, inode: int, image: OpenImage, pid: int, *, writing: bool) -> bool:
        """The process `pid` opened a file of the image.

        Return False to have the kernel drop its cached pages.
        """
        return True

    def read(self, file: int, offset: int, length: int) -> None:
        """A read of this range was requested."""

    def closed(self, file: int) -> Callable[[], object] | None:
        """The file was closed. Return the work that remains, which may block, or None."""
        return None

    def stop(self, seconds: float) -> bool:
        """End all work, and return whether it ended. Blocks for a small multiple of `seconds`.

        Safe to call again, and from any thread.
        """
        return True

    def ready(self, readahead_kib: int | None) -> None:
        """The mount answers requests. The kernel reads ahead this much (None: unknown)."""

    def close(self) -> None:
        """Release what the observer holds of the mount. Called once, after `stop`."""
