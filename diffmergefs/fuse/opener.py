"""Opening images, and looking at nodes, in worker threads while the event loop goes on."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import trio

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.layer import Layer
from diffmergefs.core.singleflight import SingleFlight
from diffmergefs.fuse.nodes import (
    MemoryFile,
    Node,
    OpenImage,
    Root,
    TagFolder,
    lane_of,
    lane_of_node,
)
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.threads import Lanes, once_in_thread
from diffmergefs.fuse.tree import Tree
from diffmergefs.stores.snapshot import Snapshot

log = logging.getLogger(__name__)

T = TypeVar("T")

_OPENING_THREADS = 64


class ImageOpener:
    """Does the work on a tree that may block, and shares it between clients.

    Each layer and each image is opened once, however many clients ask for it. Work on each
    filesystem has its own threads: see `Lanes`. Call the methods in the event loop. They raise what
    the methods of `Tree` and `Store` raise.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._shared: SingleFlight[Any] = SingleFlight()
        #: For everything that waits for a file.
        self.lanes = Lanes(_OPENING_THREADS)
        #: For what keeps a processor busy: hashes, and the comparison of pages.
        self.hashing = Lanes(os.cpu_count() or 1)

    async def run(self, node: Node, work: Callable[..., T], *args: Any) -> T:
        """The result of `work(*args)`, called in a thread of the node's filesystem."""
        return await self.lanes.run(lane_of_node(node), work, *args)

    async def child(self, folder: Node, name: str) -> Node:
        """The entry `name` of a directory. A memory file is opened if it is not open yet."""
        if isinstance(folder, TagFolder) and name == self._tree.memory_name(folder.tag):
            # The image that was opened just now, whatever a look has found meanwhile.
            return MemoryFile(await self.image(folder.tag))
        lane = self._lane_of_tag(name) if isinstance(folder, Root) else lane_of_node(folder)
        return await self.lanes.run(lane, self._tree.child, folder, name)

    async def names(self, folder: Node) -> tuple[bytes, ...]:
        """The names in a directory, listed once for all clients that ask meanwhile.

        The image of a tag is opened first, so that `Tree.child` knows its memory file.
        """
        if isinstance(folder, TagFolder):
            try:
                await self.image(folder.tag)
            except (DiffMergeError, OSError) as error:
                log.debug("%s: has no memory file: %s", folder.tag, error)
        key, lane = ("names", folder), lane_of_node(folder)
        return await self._once(self.lanes, key, lane, self._tree.names, folder)

    async def image(self, tag: str) -> OpenImage:
        """The image of a tag, opened now if it is not open yet."""
        store = self._tree.store
        assert store is not None
        if known := store.opened(tag):
            return known
        # Open layer by layer, so that clients wait for each in the event loop and not in a thread:
        # many clients of one slow layer must not use up the threads that others need. This list
        # holds the layers until the image does. Store.open judges a layer that cannot be opened.
        layers: list[Layer] = []
        links = store.chain(tag) or []
        for link in links:
            with contextlib.suppress(DiffMergeError, OSError):
                # The comparison of a record keeps a processor busy, like a hash.
                lanes = self.hashing if link.layer.records else self.lanes
                key = link.layer.key, link.layer.records
                lane = lane_of(link.layer.key.device)
                layers.append(await self._once(lanes, key, lane, store.open_layer, link.layer))
        if len(layers) == len(links):
            await self._read_layers(store, layers)
        async with trio.open_nursery() as nursery:
            for parent, link in store.pins(tag):
                nursery.start_soon(self._hash_parent, store, parent, link)
        return await self._once(self.lanes, tag, self._lane_of_tag(tag), store.open, tag)

    async def _read_layers(self, store: Store, layers: Sequence[Layer]) -> None:
        # Reading pages of a layer keeps a processor busy too, and slow storage takes its time: so
        # not in the threads in which others open theirs. Store.open has the verdict.
        lane = lane_of(*(layer.key.device for layer in layers))
        for number in await self.lanes.run(lane, store.unread, layers):
            with contextlib.suppress(DiffMergeError, OSError):
                part = layers[: number + 1]
                key = "pages", *(layer.key for layer in part)
                await self._once(self.hashing, key, lane, store.read, part)

    async def _hash_parent(self, store: Store, parent: Snapshot, link: Snapshot) -> None:
        # A hash keeps a processor busy for a second per gigabyte: never run more of them at a time
        # than there are processors. Store.open has the verdict.
        with contextlib.suppress(DiffMergeError, OSError):
            key = parent.layer.key, link.parent_hash
            lane = lane_of(parent.layer.key.device)
            await self._once(self.hashing, key, lane, store.require_pin, parent, link)

    async def _once(
        self, lanes: Lanes, key: object, lane: Hashable, work: Callable[..., T], *args: Any
    ) -> T:
        run = functools.partial(lanes.run, lane)
        return await once_in_thread(self._shared, key, functools.partial(work, *args), run)

    def _lane_of_tag(self, tag: str) -> Hashable:
        links = self._tree.store.chain(tag) if self._tree.store else None
        return lane_of(*(link.layer.key.device for link in links or []))
