"""The pyfuse3 adapter: it translates between the kernel's requests and the tree."""

from __future__ import annotations

import errno
import functools
import os
import secrets
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any, NoReturn, cast

import pyfuse3
import trio
from pyfuse3 import FUSEError

from diffmergefs.core import workers
from diffmergefs.fuse.dropbehind import DropBehind
from diffmergefs.fuse.handles import Handle, Handles, Observer
from diffmergefs.fuse.handover import Handover
from diffmergefs.fuse.marks import PAGE_BITS, Marks, mark_of_reads
from diffmergefs.fuse.nodes import Attributes, Document, MemoryFile, Node, Passed, StatusFile
from diffmergefs.fuse.opener import ImageOpener
from diffmergefs.fuse.replies import Buffers, answering, entry_of, fuse_error, statvfs_of
from diffmergefs.fuse.service import Service
from diffmergefs.fuse.status import Metrics, Status, rendered, status_of
from diffmergefs.fuse.threads import Lanes
from diffmergefs.fuse.tree import Tree
from diffmergefs.system.board import Board
from diffmergefs.system.line import Line

_READING_THREADS = 64
_READDIR_BATCH = 64


class Operations(pyfuse3.Operations):
    """Serves a tree read-only. It refuses every change with EROFS.

    Worker threads do everything that can block. A read whose bytes are in the page cache is
    answered at once.
    """

    supports_dot_lookup = False
    enable_acl = False

    def __init__(
        self, tree: Tree, drop_behind: DropBehind | None = None, observer: Observer | None = None
    ) -> None:
        super().__init__()
        self.tree = tree
        self.opener = ImageOpener(tree)
        self._inodes = tree.inodes
        self.metrics = Metrics()
        self.observer = observer or Observer()
        self.answers = trio.Event()  # set at the kernel's first request
        self._drop_behind = drop_behind
        # Each mount begins with the same inode numbers. A file handle from an earlier mount, which
        # NFS and open_by_handle_at(2) keep, must not open another image. The kernel takes 32 bits.
        self._entry = functools.partial(entry_of, 1 + secrets.randbelow(0xFFFFFFFF))
        self.handles = Handles()
        # Open files of earlier servers, by inode. An open whose answer the kernel never got may be
        # among them, and is never closed; but the kernel forgets no inode that it has open.
        self._adopted: dict[int, list[int]] = {}
        self._by_number = self.handles.by_number  # looked up in each read
        self._replies = Buffers()
        self._reading = Lanes(_READING_THREADS)
        self._mark(Marks(Board()))
        self._service: Callable[[], Service] = Service

    def init(self) -> None:
        self.answers.set()

    @property
    def open_files(self) -> int:
        """How many files are open or mapped. Directories do not count."""
        return self.handles.open_files()

    def take_over(self, line: Line, handover: Handover | None) -> None:
        """Go on, in a new server, from where the server before ended."""
        self._mark(Marks(line.board, line.suspects, line.poisoned, line.clear))
        self._service = functools.partial(Service.of, line, resends=handover is not None)
        if handover is None:
            return
        handover.begin(line, self._inodes, self.handles, self.tree.store)
        for fh, handle in list(self.handles.by_number.items()):
            node = MemoryFile(handle.image) if handle.image else handle.node
            if node is None:
                continue  # it is lost, and its readers get errors
            inode = self._inodes.known_number(node)
            if inode is None:
                self._close(fh)
                continue
            self._adopted.setdefault(inode, []).append(fh)
            if handle.image is not None:
                handle.supplied = self.metrics.of_tag(handle.image.tag)
                handle.mark = mark_of_reads(inode)

    def _mark(self, marks: Marks) -> None:
        self.marks = marks
        # Looked up in each read.
        self._now = marks.numbers
        self._watch = marks if marks.is_watchful else None
        if marks.is_watchful:
            self.read = self._read_in_turn  # type: ignore[method-assign]

    # Names and attributes

    @answering
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        node = await self.opener.child(self._inodes.node(parent_inode), os.fsdecode(name))
        attributes = await self._attributes(node)
        entry = self._entry(self._inodes.number(node), attributes)
        self._inodes.look_up(entry.st_ino)
        return entry

    @answering
    async def getattr(
        self, inode: int, ctx: pyfuse3.RequestContext | None
    ) -> pyfuse3.EntryAttributes:
        attributes = await self._attributes(self._inodes.node(inode))
        return self._entry(inode, attributes)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            self._inodes.forget(inode, count)
            if inode in self._adopted and not self._inodes.is_known(inode):
                for fh in self._adopted.pop(inode):
                    self._close(fh)

    @answering
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        node = self._inodes.node(inode)
        if not isinstance(node, Passed):
            raise FUSEError(errno.EINVAL)
        return os.fsencode(await self.opener.run(node, self.tree.passthrough.link_target, node))

    @answering
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        return statvfs_of(*self.tree.totals())

    # Directories

    @answering
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        folder = self._inodes.node(inode)
        return self.handles.add_folder(folder, await self.opener.names(folder))

    @answering
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing, folder = self._by_number[fh].names, self._by_number[fh].node
        if listing is None or folder is None:
            raise FUSEError(errno.ENOTDIR)
        added = 0
        try:
            for first in range(start_id, len(listing.parts), _READDIR_BATCH):
                names = listing.parts[first : first + _READDIR_BATCH]
                entries = await self.opener.run(folder, self.tree.entries, folder, names)
                for number, (name, entry) in enumerate(zip(names, entries, strict=True), first + 1):
                    if entry is None:
                        continue
                    if not self._add_entry(token, name, entry, number):
                        return
                    added += 1
        except Exception:
            # An error would discard the entries that were added. The kernel would never see them,
            # and never forget their lookups. The next request meets the error first.
            if not added:
                raise

    def _add_entry(
        self, token: pyfuse3.ReaddirToken, name: bytes, entry: tuple[Node, Attributes], number: int
    ) -> bool:
        # An entry that is added counts as looked up. An entry without room does not.
        inode = self._inodes.number(entry[0])
        if pyfuse3.readdir_reply(token, name, self._entry(inode, entry[1]), number):
            self._inodes.look_up(inode)
            return True
        self._inodes.forget(inode)
        return False

    @answering
    async def releasedir(self, fh: int) -> None:
        self.handles.remove(fh)

    # Files

    @answering
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        node = self._inodes.node(inode)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        # libfuse sends O_TRUNC here and never calls setattr. If this let it through, the kernel
        # would drop the pages of every live mapping.
        if flags & os.O_TRUNC or (writing and not isinstance(node, MemoryFile)):
            raise FUSEError(errno.EROFS)
        match node:
            case MemoryFile(image):
                if not self.tree.is_served(image):
                    await self.opener.run(node, self.tree.require_same_access, image)
                # With direct_io the kernel refuses MAP_SHARED, whose writes would reach every
                # reader's page cache. It allows MAP_PRIVATE, which a VMM uses.
                handle = Handle(image=image, mark=mark_of_reads(inode))
                handle.supplied = self.metrics.of_tag(image.tag)
                fh = self.handles.add(handle)
                keep = self.observer.opened(fh, inode, image, ctx.pid, writing=writing)
                return pyfuse3.FileInfo(fh=fh, keep_cache=keep and not writing, direct_io=writing)
            case Document():
                content = await self.opener.run(node, self.tree.passthrough.content, node)
                return pyfuse3.FileInfo(fh=self.handles.add_text(node, content))
            case Passed():
                opened = await self.opener.run(node, Handle.of_file, self.tree.passthrough, node)
                # The file may have been overwritten since the kernel cached it.
                return pyfuse3.FileInfo(fh=self.handles.add(opened), keep_cache=False)
            case StatusFile(name):
                # All reads of one handle see the status at its opening, and no page cache keeps it.
                content = await self.opener.run(node, rendered, name, self._status())
                fh = self.handles.add_text(node, content)
                return pyfuse3.FileInfo(fh=fh, direct_io=True, keep_cache=False)
        raise FUSEError(errno.EISDIR)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        # By far the most frequent request: it saves the second coroutine of `answering`.
        began = perf_counter_ns()
        metrics = self.metrics
        metrics.requests["read"] += 1
        numbers, watch = self._now, self._watch
        try:
            handle = self._by_number[fh]
            view = handle.view
            if view is None:
                return await self._read_other(handle, off, size)
            size = min(size, max(0, view.size - off))
            numbers[0] = mark = handle.mark | off >> PAGE_BITS
            if watch is not None:
                watch.require_sound((mark, 0, 0, 0))
            self.observer.read(fh, off, size)
            # One buffer serves all requests: nothing awaits between here and the reply, and
            # pyfuse3 sends the reply before anything else runs.
            buffer = self._replies.shared(size)
            supplied: dict[int, int] = {}
            done = view.fill_nowait(buffer, off, supplied)
            if done < size:
                metrics.waited += 1
                numbers[0] = 0
                place = self.marks.begin(mark, 0, 0, 0)
                try:
                    buffer = await self._read_rest(handle, off, supplied, buffer[:done], size)
                finally:
                    self.marks.end(place)
            if self._drop_behind is not None:
                self._drop_behind.served(view, off, size)
            metrics.read(perf_counter_ns() - began, supplied, handle.supplied)
            numbers[0] = 0
            if watch is not None:
                watch.answered((mark, 0, 0, 0))
            # pyfuse3 takes any contiguous buffer, and makes no copy of it.
            return cast(bytes, buffer)
        except Exception as error:
            numbers[0] = 0
            raise fuse_error(metrics, "read", error) from error

    async def _read_in_turn(self, fh: int, off: int, size: int) -> bytes:
        handle = self.handles.by_number.get(fh)
        mark = handle.mark | off >> PAGE_BITS if handle else 0
        async with self.marks.turn((mark, 0, 0, 0)):
            return await Operations.read(self, fh, off, size)

    async def _read_rest(
        self, handle: Handle, off: int, supplied: dict[int, int], begun: memoryview, size: int
    ) -> memoryview:
        # One thread reads the whole rest, into a buffer of its own.
        done = len(begun)
        buffer = self._replies.take(size)
        buffer[:done] = begun
        lane, view = handle.lane(off + done, size - done), handle.view
        assert view is not None
        await self._reading.run(lane, view.fill, buffer, off, supplied, done)
        # The next request, which comes after the reply, may use the buffer. If this one was
        # cancelled or failed, its buffer is left to the thread.
        self._replies.give_back(buffer)
        return buffer

    async def _read_other(self, handle: Handle, off: int, size: int) -> bytes:
        if handle.text is not None:
            return handle.text.parts[0][off : off + size]
        if handle.fd is None:
            raise FUSEError(errno.EIO if handle.names is None else errno.EISDIR)
        return await self._reading.run(handle.lane(off, size), handle.read_file, off, size)

    @answering
    async def release(self, fh: int) -> None:
        self._close(fh)
        if (work := self.observer.closed(fh)) is not None:
            await self.opener.lanes.run("observer", work)

    def _close(self, fh: int) -> None:
        handle = self.handles.remove(fh)
        if handle is not None and handle.fd is not None:
            workers.close(handle.fd, handle.device)

    async def _ignore(self, *args: Any, **kwargs: Any) -> None:
        pass

    flush = fsync = fsyncdir = _ignore

    # Extended attributes of memory files. For `user.*` the kernel requires read permission.

    @answering
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        node = self._inodes.node(inode)
        if not isinstance(node, MemoryFile) or name not in node.image.XATTRS:
            raise FUSEError(pyfuse3.ENOATTR)
        root = self.tree.store.root if self.tree.store else "/"
        return await self.opener.run(node, node.image.xattr, root, name)

    @answering
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        node = self._inodes.node(inode)
        return list(node.image.XATTRS) if isinstance(node, MemoryFile) else []

    # Changes, which are all refused

    async def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise FUSEError(errno.EROFS)

    setattr = mknod = mkdir = unlink = rmdir = symlink = rename = link = _refuse
    create = write = setxattr = removexattr = _refuse

    # Helpers

    def _status(self) -> Status:
        # Taken in the event loop, so that all numbers are of one moment.
        store = self.tree.store
        images = self.handles.images()
        if store is not None:
            self.metrics.fold({*store.tags(), *(image.tag for image in images)})
        return status_of(
            self.metrics,
            pushed_bytes=self.observer.pushed_bytes,
            hit_bytes=self.observer.hit_bytes,
            images=self._inodes.open_images(),
            files=len(images),
            service=self._service(),
        )

    async def _attributes(self, node: Node) -> Attributes:
        if isinstance(node, MemoryFile):
            return self.tree.attributes(node)
        try:
            return await self.opener.run(node, self.tree.attributes, node)
        except OSError:
            # An open file keeps its attributes, even if another file is now at its path.
            fd = self.handles.descriptor_of(node)
            if fd is None or not isinstance(node, Passed):
                raise
            return await self.opener.run(node, self.tree.passthrough.attributes_of_open, node, fd)
