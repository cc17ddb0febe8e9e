"""The pyfuse3 adapter: it only translates between the kernel's requests and the tree."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable, Sequence
from time import perf_counter_ns
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import FUSEError

from diffmergefs.core import background
from diffmergefs.core.buffers import Buffers
from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.identity import FileKey
from diffmergefs.core.layer import Layer
from diffmergefs.core.singleflight import SingleFlight
from diffmergefs.core.version import __version__
from diffmergefs.fuse.dropbehind import DropBehind
from diffmergefs.fuse.handles import Contents, Handle, lane_of
from diffmergefs.fuse.image import XATTRS, OpenImage, xattr
from diffmergefs.fuse.observer import NullObserver, Observer
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.status import METRICS_FILE, Metrics, Status, exposition, status_of
from diffmergefs.fuse.threads import Lanes, once_in_thread
from diffmergefs.fuse.tree import (
    Attributes,
    Document,
    MemoryFile,
    Node,
    Passed,
    Root,
    StatusFile,
    TagFolder,
    Tree,
)
from diffmergefs.stores.snapshot import Snapshot

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# Names and the attributes of what is passed through may change; a memory file's never do, and a
# changed attribute would drop its cached pages under live mappings.
CHANGING_SECONDS = 0.5
CONSTANT_SECONDS = 365 * 86400
_OPENING_THREADS = 64
_READING_THREADS = 64
_READDIR_BATCH = 64


def answering(
    handler: Callable[P, Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """The handler with every failure turned into an errno for the client.

    pyfuse3 ends the daemon on any other exception, and every VM on the mount would get SIGBUS.
    """

    @functools.wraps(handler)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> T:
        metrics = cast(Operations, args[0]).metrics
        metrics.requests[handler.__name__] += 1
        try:
            return await handler(*args, **kwargs)
        except Exception as error:
            raise _fuse_error(metrics, handler.__name__, error) from error

    return answer


def _fuse_error(metrics: Metrics, handler: str, error: Exception) -> FUSEError:
    # What the client gets for it, after the log and the counters have it.
    number = errno.EIO
    if isinstance(error, FUSEError):
        number = error.errno
    elif isinstance(error, DiffMergeError):
        log.debug("%s: %s", handler, error)
        number = error.errno
    elif isinstance(error, OSError):
        level = logging.WARNING if error.errno == errno.EIO else logging.DEBUG
        log.log(level, "%s: %s", handler, error)
        number = error.errno or errno.EIO
    else:
        log.error("%s failed: this is a bug", handler, exc_info=error)
    metrics.errors[handler, number] += 1
    return FUSEError(number)


class Operations(pyfuse3.Operations):
    """Serves a tree, read-only: every change is answered with EROFS.

    Opening, syncing, walking, merging and anything else that can block runs in worker threads,
    each layer and each image once however many clients ask; a read whose bytes are in the page
    cache is answered at once.
    """

    supports_dot_lookup = False
    enable_acl = False

    def __init__(
        self, tree: Tree, drop_behind: DropBehind | None = None, observer: Observer | None = None
    ) -> None:
        super().__init__()
        self.tree = tree
        self.metrics = Metrics()
        self.observer = observer or NullObserver()
        self.answers = trio.Event()  # set at the kernel's first request
        self._drop_behind = drop_behind
        # Inode numbers begin anew with each mount: a file handle from an earlier one, which NFS and
        # open_by_handle_at(2) keep, must not open another image. The kernel has 32 bits for it.
        self._generation = 1 + secrets.randbelow(0xFFFFFFFF)
        self._handles: dict[int, Handle] = {}
        self._contents = Contents()
        self._replies = Buffers()
        self._next_handle = 1
        self._lookups: Counter[int] = Counter()
        self._shared: SingleFlight[object] = SingleFlight()
        self._opening = Lanes(_OPENING_THREADS)
        self._reading = Lanes(_READING_THREADS)
        self._hashing = Lanes(os.cpu_count() or 1)

    def init(self) -> None:
        self.answers.set()

    @property
    def open_files(self) -> int:
        """How many files are open, mapped ones among them; directories do not count."""
        return sum(1 for handle in self._handles.values() if handle.names is None)

    # Names and attributes

    @answering
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        folder = self.tree.node(parent_inode)
        text = os.fsdecode(name)
        node: Node
        if isinstance(folder, TagFolder) and text == self.tree.memory_name(folder.tag):
            # What was opened just now, whatever a look has found meanwhile.
            node = MemoryFile(await self._open_image(folder.tag))
        else:
            node = await self._opening.run(self._lane(folder, text), self.tree.child, folder, text)
        attributes = await self._attributes(node)
        entry = self._entry(self.tree.inode(node), attributes)
        self._lookups[entry.st_ino] += 1
        return entry

    @answering
    async def getattr(
        self, inode: int, ctx: pyfuse3.RequestContext | None
    ) -> pyfuse3.EntryAttributes:
        attributes = await self._attributes(self.tree.node(inode))
        return self._entry(inode, attributes)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            self._lookups[inode] -= count
            if self._lookups[inode] <= 0:
                del self._lookups[inode]
                self.tree.forget(inode)

    @answering
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        node = self.tree.node(inode)
        if not isinstance(node, Passed):
            raise FUSEError(errno.EINVAL)
        return os.fsencode(await self._in_thread(node, self.tree.link_target, node))

    @answering
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        answer = pyfuse3.StatvfsData()
        store, explicit = self.tree.store, self.tree.explicit
        size = store.total_bytes() if store else explicit.view.size if explicit else 0
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_blocks = -(-size // 4096)
        answer.f_bfree = answer.f_bavail = 0
        answer.f_files = len(store.tags()) if store else 1
        answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = 255
        return answer

    # Directories

    @answering
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        folder = self.tree.node(inode)
        if isinstance(folder, TagFolder):
            await self._try_to_open_image(folder.tag)
        work = functools.partial(self.tree.names, folder)
        names = await self._once(("names", folder), self._lane(folder), work)
        listing = self._contents.shared(folder, *cast(tuple[bytes, ...], names))
        return self._register(Handle(names=listing, node=folder))

    @answering
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing, folder = self._handles[fh].names, self._handles[fh].node
        if listing is None or folder is None:
            raise FUSEError(errno.ENOTDIR)
        added = 0
        try:
            for first in range(start_id, len(listing.parts), _READDIR_BATCH):
                names = listing.parts[first : first + _READDIR_BATCH]
                entries = await self._in_thread(folder, self._entries, folder, names)
                for number, (name, entry) in enumerate(zip(names, entries, strict=True), first + 1):
                    if entry is None:
                        continue
                    if not self._add_entry(token, name, *entry, number):
                        return
                    added += 1
        except Exception:
            # An error would take back what was added: the kernel would never see it, and never
            # forget what counts as looked up. The next request meets the error first.
            if not added:
                raise

    def _add_entry(
        self,
        token: pyfuse3.ReaddirToken,
        name: bytes,
        node: Node,
        attributes: Attributes,
        number: int,
    ) -> bool:
        # An entry that is added counts as looked up; one for which there is no room does not.
        inode = self.tree.inode(node)
        is_added = pyfuse3.readdir_reply(token, name, self._entry(inode, attributes), number)
        if is_added:
            self._lookups[inode] += 1
        elif inode not in self._lookups:
            self.tree.forget(inode)
        return is_added

    def _entries(
        self, folder: Node, names: Sequence[bytes]
    ) -> list[tuple[Node, Attributes] | None]:
        # None for an entry that went away since its directory was opened, or has no place in it.
        texts = [os.fsdecode(name) for name in names]
        children = self.tree.children(folder, texts)
        found: list[tuple[Node, Attributes] | None] = []
        for text in texts:
            entry = None
            if text in children:
                with contextlib.suppress(OSError, DiffMergeError):
                    entry = children[text], self.tree.attributes(children[text])
            found.append(entry)
        return found

    @answering
    async def releasedir(self, fh: int) -> None:
        self._handles.pop(fh, None)

    # Files

    @answering
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        node = self.tree.node(inode)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        # libfuse sends O_TRUNC here and never asks setattr: let through, the kernel would drop the
        # pages of every live mapping.
        if flags & os.O_TRUNC or (writing and not isinstance(node, MemoryFile)):
            raise FUSEError(errno.EROFS)
        match node:
            case MemoryFile(shown):
                if not self.tree.is_shown(shown):
                    await self._in_thread(node, self.tree.require_same_access, shown)
                # With direct_io the kernel refuses MAP_SHARED, through which a store would reach
                # every reader's page cache; MAP_PRIVATE, which a VMM uses, it lets through.
                handle = self._register(Handle(image=shown))
                self._handles[handle].supplied = self.metrics.of_tag(shown.tag)
                keep = self.observer.opened(handle, inode, shown, ctx, writing=writing)
                keep = keep and not writing
                return pyfuse3.FileInfo(fh=handle, keep_cache=keep, direct_io=writing)
            case Document():
                content = await self._in_thread(node, self.tree.content, node)
                text = self._contents.shared(node, content)
                return pyfuse3.FileInfo(fh=self._register(Handle(text=text)))
            case Passed():
                fd, key = await self._in_thread(node, self._open_passed, node)
                # It may have been overwritten since it was cached.
                fh = self._register(Handle(fd=fd, node=node, key=key))
                return pyfuse3.FileInfo(fh=fh, keep_cache=False)
            case StatusFile(name):
                # What is read through one handle is of one moment, and no page cache keeps it.
                content = await self._in_thread(node, _rendered, name, self._status())
                text = self._contents.shared(node, content)
                handle = self._register(Handle(text=text))
                return pyfuse3.FileInfo(fh=handle, direct_io=True, keep_cache=False)
        raise FUSEError(errno.EISDIR)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        # The most frequent request by far: without the second coroutine that `answering` takes.
        began = perf_counter_ns()
        metrics = self.metrics
        metrics.requests["read"] += 1
        try:
            handle = self._handles[fh]
            view = handle.view
            if view is None:
                return await self._read_other(handle, off, size)
            size = min(size, max(0, view.size - off))
            self.observer.read(fh, off, size)
            # One buffer serves all requests: nothing awaits between here and the reply, which
            # pyfuse3 sends before anything else runs.
            buffer = self._replies.shared(size)
            supplied: dict[int, int] = {}
            done = view.fill_nowait(buffer, off, supplied)
            if done < size:
                metrics.waited += 1
                buffer = await self._read_rest(handle, off, supplied, buffer[:done], size)
            if self._drop_behind is not None:
                self._drop_behind.served(view, off, size)
            metrics.read(perf_counter_ns() - began, supplied, handle.supplied)
            # A reply may be any contiguous buffer: no copy is made of it.
            return cast(bytes, buffer)
        except Exception as error:
            raise _fuse_error(metrics, "read", error) from error

    async def _read_rest(
        self, handle: Handle, off: int, supplied: dict[int, int], begun: memoryview, size: int
    ) -> memoryview:
        # The whole rest in one go in a thread, into a buffer of its own.
        done = len(begun)
        buffer = self._replies.take(size)
        buffer[:done] = begun
        lane, view = handle.lane(off + done, size - done), handle.view
        assert view is not None
        await self._reading.run(lane, view.fill, buffer, off, supplied, done)
        # For the next request, which comes after the reply. If this one was cancelled or failed,
        # its buffer is left to the thread.
        self._replies.give_back(buffer)
        return buffer

    async def _read_other(self, handle: Handle, off: int, size: int) -> bytes:
        if handle.text is not None:
            return handle.text.parts[0][off : off + size]
        if handle.fd is None:
            raise FUSEError(errno.EISDIR)
        return await self._reading.run(lane_of(handle.device), handle.read_file, off, size)

    @answering
    async def release(self, fh: int) -> None:
        handle = self._handles.pop(fh, None)
        if handle is not None and handle.fd is not None:
            background.close(handle.fd, handle.device)
        if (work := self.observer.closed(fh)) is not None:
            await self._opening.run("watch", work)

    async def flush(self, fh: int) -> None:
        pass

    async def fsync(self, fh: int, datasync: bool) -> None:
        pass

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        pass

    # Extended attributes: a memory file's. Who may not read the file does not get here: the kernel
    # sees to that for `user.*`, as it does for reading.

    @answering
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        node = self.tree.node(inode)
        if not isinstance(node, MemoryFile) or name not in XATTRS:
            raise FUSEError(pyfuse3.ENOATTR)
        root = self.tree.store.root if self.tree.store else "/"
        return await self._in_thread(node, xattr, node.shown.view, root, name)

    @answering
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return list(XATTRS) if isinstance(self.tree.node(inode), MemoryFile) else []

    # Changes: none is ever made

    async def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise FUSEError(errno.EROFS)

    setattr = mknod = mkdir = unlink = rmdir = symlink = rename = link = _refuse
    create = write = setxattr = removexattr = _refuse

    # How things get done

    def _status(self) -> Status:
        # Of this moment, so in the event loop; to write it out takes longer and may wait.
        store = self.tree.store
        opened = [handle.image for handle in self._handles.values() if handle.image]
        if store is not None:
            self.metrics.fold({*store.tags(), *(image.tag for image in opened)})
        return status_of(
            self.metrics,
            version=__version__,
            pid=os.getpid(),
            pushed_bytes=self.observer.pushed_bytes,
            hit_bytes=self.observer.hit_bytes,
            taints=Layer.taints,
            images=self.tree.open_images(),
            files=len(opened),
        )

    def _register(self, handle: Handle) -> int:
        number = self._next_handle
        self._next_handle += 1
        self._handles[number] = handle
        return number

    def _entry(self, inode: int, known: Attributes) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.generation = self._generation
        entry.entry_timeout = CHANGING_SECONDS
        entry.attr_timeout = CONSTANT_SECONDS if known.constant else CHANGING_SECONDS
        entry.st_mode = known.mode
        entry.st_uid, entry.st_gid = known.uid, known.gid
        entry.st_size, entry.st_blocks, entry.st_blksize = known.size, known.blocks, 4096
        entry.st_nlink = known.nlink
        entry.st_rdev = 0
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = known.mtime_ns
        return entry

    def _open_passed(self, node: Passed) -> tuple[int, FileKey | None]:
        fd = self.tree.open_passed(node)
        return fd, FileKey.of(os.fstat(fd)) if self.tree.is_device_state(node) else None

    async def _attributes(self, node: Node) -> Attributes:
        if isinstance(node, MemoryFile):
            return self.tree.attributes(node)
        try:
            return await self._in_thread(node, self.tree.attributes, node)
        except OSError:
            # What is open stays what it is, whatever stands at its path by now.
            held = [h.fd for h in self._handles.values() if h.fd is not None and h.node == node]
            if not held or not isinstance(node, Passed):
                raise
            return await self._in_thread(node, self.tree.attributes_of_open, node, held[0])

    async def _try_to_open_image(self, tag: str) -> None:
        try:
            await self._open_image(tag)
        except (DiffMergeError, OSError) as error:
            log.debug("%s: has no memory file: %s", tag, error)

    async def _open_image(self, tag: str) -> OpenImage:
        store = self.tree.store
        assert store is not None
        if known := store.opened(tag):
            return known
        # Layer by layer, so that each is waited for in the event loop and not in a thread: many
        # clients of one slow layer must not use up the threads that others need. The layers are
        # held here until the image holds them. One that cannot be opened is judged by store.open.
        layers: list[Layer] = []
        links = store.chain(tag) or []
        for link in links:
            with contextlib.suppress(DiffMergeError, OSError):
                work = functools.partial(store.open_layer, link.layer)
                # To compare a record takes a processor, as to hash a parent does.
                lanes = self._hashing if link.layer.records else self._opening
                key = link.layer.key, link.layer.records
                opened = await self._once(key, lane_of(key[0].device), work, lanes)
                layers.append(cast(Layer, opened))
        if len(layers) == len(links):
            await self._read_layers(store, layers)
        async with trio.open_nursery() as nursery:
            for parent, link in store.pins(tag):
                nursery.start_soon(self._hash_parent, store, parent, link)
        lane, opening = self._lane_of_tag(tag), functools.partial(store.open, tag)
        return cast(OpenImage, await self._once(tag, lane, opening))

    async def _read_layers(self, store: Store, layers: Sequence[Layer]) -> None:
        # To look into a layer takes a processor too, and slow storage its time: not in the threads
        # in which others open theirs. store.open has the verdict.
        lane = lane_of(*(layer.key.device for layer in layers))
        for number in await self._opening.run(lane, store.unread, layers):
            with contextlib.suppress(DiffMergeError, OSError):
                work = functools.partial(store.read, layers[: number + 1])
                key = "pages", *(layer.key for layer in layers[: number + 1])
                await self._once(key, lane, work, self._hashing)

    async def _hash_parent(self, store: Store, parent: Snapshot, link: Snapshot) -> None:
        # A hash takes a processor for a second a gigabyte: never more at a time than there are,
        # whoever waits. store.open has the verdict.
        with contextlib.suppress(DiffMergeError, OSError):
            work = functools.partial(store.require_pin, parent, link)
            key = parent.layer.key, link.parent_hash
            await self._once(key, lane_of(key[0].device), work, self._hashing)

    async def _once(
        self, key: object, lane: Hashable, work: Callable[[], object], lanes: Lanes | None = None
    ) -> object:
        run = functools.partial((lanes or self._opening).run, lane)
        return await once_in_thread(self._shared, key, work, run)

    async def _in_thread(self, node: Node, work: Callable[..., T], *args: Any) -> T:
        return await self._opening.run(self._lane(node), work, *args)

    def _lane(self, node: Node, name: str | None = None) -> Hashable:
        # The filesystems of what is looked at: the node, or one of its entries. To list the root
        # looks at the directories of all tags, and is apart from the looks at one.
        match node:
            case Passed() | TagFolder() | Document():
                return lane_of(node.device)
            case MemoryFile():
                return lane_of(*(layer.key.device for layer in node.shown.view.layers))
            case Root() if name is not None:
                return self._lane_of_tag(name)
        return type(node).__name__

    def _lane_of_tag(self, tag: str) -> Hashable:
        links = self.tree.store.chain(tag) if self.tree.store else None
        return lane_of(*(link.layer.key.device for link in links or []))


def _rendered(name: str, status: Status) -> bytes:
    return exposition(status) if name == METRICS_FILE else status.to_json().encode()
