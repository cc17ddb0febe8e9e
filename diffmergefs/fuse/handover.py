"""What a server leaves to its successor: numbers, open files and images, and what it saw.

Each fact is in the journal before the kernel gets the answer that makes it true, and the keeper
holds the descriptors for it. A successor serves the same bytes, or an error where something is
missing. A fact that is recorded twice does no harm, and neither does one whose answer never came.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.arena import Arena, Place
from diffmergefs.fuse.handles import Content, Handle, Handles
from diffmergefs.fuse.journal import Journal, Record
from diffmergefs.fuse.known import HandleFacts, ImageFacts, ImageNode, Known
from diffmergefs.fuse.nodes import Inodes, MemoryFile, Node, OpenImage
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.tags import Keys
from diffmergefs.system.board import Board
from diffmergefs.system.line import Line

log = logging.getLogger(__name__)

T = TypeVar("T")


class Handover:
    """Records what one server knows, and gives it to the next. Make it in the keeper."""

    def __init__(self, board: Board) -> None:
        self._journal = Journal(board)
        self._arena = Arena(board)
        self._images: weakref.WeakKeyDictionary[OpenImage, int] = weakref.WeakKeyDictionary()
        self._facts: dict[int, ImageFacts] = {}
        self._layers: weakref.WeakKeyDictionary[Layer, int] = weakref.WeakKeyDictionary()
        self._merged: weakref.WeakKeyDictionary[MergedView, Place] = weakref.WeakKeyDictionary()
        self._contents: weakref.WeakKeyDictionary[Content, int] = weakref.WeakKeyDictionary()
        self._inherited: dict[int, OpenImage] = {}
        self._inherited_layers: dict[int, Layer] = {}
        # How layers, by their number, are held, and the place of their extents.
        self._held: dict[int, tuple[int, Place]] = {}
        self._files: dict[int, int] = {}  # how open passed-through files are held, by handle
        self._source = 0  # how SOURCE is held, if it is another directory than at the start
        self._look: Place | None = None
        self.readahead: int | None = None  # set once, by the first server
        self._numbers = itertools.count(1)
        self._gone: deque[Callable[[], object]] = deque()
        #: Called in any thread when there is something to `tend` in the event loop.
        self.wake: Callable[[], None] = lambda: None
        self._keeping = threading.RLock()
        self._line: Line | None = None

    def inherit(self, image: OpenImage) -> None:
        """An image that the keeper opened: all servers have it."""
        for layer in image.view.layers:
            number = next(self._numbers)
            self._inherited_layers[number] = layer
            self._know_layer(layer, number)
        self._images[image] = number = next(self._numbers)
        self._inherited[number] = image

    def _know_layer(self, layer: Layer, number: int) -> None:
        self._layers[layer] = number
        layer.facts_changed = functools.partial(self._facts_changed, number)

    def begin(self, line: Line, inodes: Inodes, handles: Handles, store: Store | None) -> None:
        """Take over from the server before, and record what this one does; call it in a server."""
        self._line, self._inodes, self._handles = line, inodes, handles
        known = Known(self._journal.read())
        self._numbers = itertools.count((line.number << 32) + 1)
        handles.begin_at((line.number << 32) + 1)
        self._adopt(known, line, store)
        self._journal.begin(self._records)
        inodes.recorded, handles.recorded = self._looked_up, self._opened
        if store is not None:
            store.keep, store.saved, store.moved = self.keep, self._saved, self._moved

    def tend(self) -> None:
        """Forget what has gone, and shorten the journal. `wake` asks for it; never raises."""
        try:
            while self._gone:
                self._gone.popleft()()
            if self._journal.is_long:
                with self._keeping:
                    self._journal.begin(self._records)
        except Exception:
            log.exception("tending the journal failed: this is a bug")

    def _record(self, *records: Record) -> None:
        self._journal.append(*records)
        if self._journal.is_long:
            self.wake()

    # What happens

    def keep(self, image: OpenImage, keys: Keys | None = None) -> None:
        """Have the image outlive this server, before it is served. Never raises; may block.

        If that fails, the log says so, and a successor's readers of it get errors.
        """
        with self._keeping:
            if image in self._images:
                return
            try:
                number, facts = next(self._numbers), self._image_facts(image, keys)
                self._record(("image", number, facts))
            except OSError as error:
                log.warning("%s: would not outlive this server: %s", image.tag, error.strerror)
                return
            self._add_image(image, number, facts)

    def _image_facts(self, image: OpenImage, keys: Keys | None) -> ImageFacts:
        return ImageFacts(
            image.name,
            image.access,
            image.visible,
            image.mtime_ns,
            image.tag,
            keys,
            tuple(map(self._keep_layer, image.view.layers)),
            self._keep_merged(image.view),
        )

    def _add_image(self, image: OpenImage, number: int, facts: ImageFacts) -> None:
        self._images[image], self._facts[number] = number, facts
        self._when_gone(image, self._forget_image, number)

    def _keep_layer(self, layer: Layer) -> int:
        if number := self._layers.get(layer):
            return number
        held = self._hold(layer.fd)
        place = self._arena.put(layer.all_extents)
        number = next(self._numbers)
        self._know_layer(layer, number)  # first, so that no change of its facts is missed
        try:
            self._record(("layer", number, held, place), ("facts", number, layer.facts))
        except OSError:
            del self._layers[layer]
            raise
        self._add_layer(layer, number, held, place)
        return number

    def _add_layer(self, layer: Layer, number: int, held: int, extents: Place) -> None:
        self._know_layer(layer, number)
        self._held[number] = held, extents
        self._when_gone(layer, self._forget_layer, number)

    def _keep_merged(self, view: MergedView) -> Place:
        if place := self._merged.get(view):
            return place
        place = self._merged[view] = self._arena.put(view.merged)
        self._when_gone(view, self._arena.free, place)
        return place

    def _hold(self, *fds: int) -> int:
        assert self._line is not None
        return self._line.hold(*fds)

    def _drop(self, held: int) -> None:
        assert self._line is not None
        self._line.drop(held)

    def _when_gone(self, thing: object, work: Callable[[T], None], of: T) -> None:
        # A finalizer may run anywhere, so it only leaves a note.
        note = functools.partial(self._later, functools.partial(work, of))
        weakref.finalize(thing, note).atexit = False

    def _later(self, work: Callable[[], object]) -> None:
        self._gone.append(work)
        self.wake()

    def _forget_image(self, number: int) -> None:
        self._facts.pop(number, None)
        self._record(("gone", number))

    def _forget_layer(self, number: int) -> None:
        self._record(("gone", number))
        held, extents = self._held.pop(number)
        self._drop(held)
        self._arena.free(extents)

    def _facts_changed(self, number: int, layer: Layer) -> None:
        self._record(("facts", number, layer.facts))

    def _looked_up(self, number: int, node: Node | None, lookups: int) -> None:
        # A node is recorded with its first lookup.
        known = self._in_journal(node) if lookups == 1 else None
        self._record(("lookups", number, known, lookups))

    def _in_journal(self, node: Node | None) -> Node | ImageNode | None:
        return ImageNode(self._images.get(node.image, 0)) if isinstance(node, MemoryFile) else node

    def _opened(self, number: int, handle: Handle | None) -> None:
        # Opened, or with None closed.
        if handle is None:
            self._record(("closed", number))
            if held := self._files.pop(number, 0):
                self._drop(held)
            return
        if handle.fd is not None:
            with contextlib.suppress(OSError):  # then a successor's readers of it get EIO
                self._files[number] = self._hold(handle.fd)
        content = handle.text or handle.names
        records: list[Record] = []
        if content is not None and content not in self._contents:
            self._contents[content] = next(self._numbers)
            records.append(("content", self._contents[content], handle.node, content.parts))
        self._record(*records, ("opened", number, self._handle_facts(number, handle)))

    def _handle_facts(self, number: int, handle: Handle) -> HandleFacts:
        content = handle.text or handle.names
        return HandleFacts(
            image=self._images.get(handle.image, 0) if handle.image else 0,
            held=self._files.get(number, 0),
            content=self._contents.get(content, 0) if content else 0,
            is_folder=handle.names is not None,
            node=handle.node,
            key=handle.key,
        )

    def _saved(self, memory: object) -> None:
        # What a look at SOURCE saw, before any request is answered by it.
        try:
            before, self._look = self._look, self._arena.put(memory)
        except OSError as error:
            log.warning("the last look would not outlive this server: %s", error.strerror)
            return
        self._record(("look", self._look))
        if before is not None:
            self._arena.free(before)

    def _moved(self, source: int) -> None:
        try:
            before, self._source = self._source, self._hold(source)
        except OSError as error:
            log.warning("the new SOURCE would not outlive this server: %s", error.strerror)
            return
        self._record(("source", self._source))
        if before:
            self._later(functools.partial(self._drop, before))

    def tuned(self, readahead: int | None) -> None:
        """The kernel's settings were made; this is its readahead (None: unknown)."""
        self.readahead = readahead or 0
        self._record(("tuned", self.readahead))

    def _records(self) -> Iterator[Record]:
        # All that is known now.
        if self.readahead is not None:
            yield "tuned", self.readahead
        if self._source:
            yield "source", self._source
        if self._look is not None:
            yield "look", self._look
        for layer, number in list(self._layers.items()):
            if number in self._held:
                yield "layer", number, *self._held[number]
            yield "facts", number, layer.facts
        for number, facts in list(self._facts.items()):
            yield "image", number, facts
        for number, node, lookups in self._inodes.known():
            yield "lookups", number, self._in_journal(node), lookups
        yield "fresh", self._inodes.fresh
        told = set()
        for number, handle in self._handles.by_number.items():
            content = handle.text or handle.names
            if content is not None and content in self._contents and content not in told:
                told.add(content)
                yield "content", self._contents[content], handle.node, content.parts
            yield "opened", number, self._handle_facts(number, handle)

    # What the server before knew

    def _adopt(self, known: Known, line: Line, store: Store | None) -> None:
        self.readahead = known.readahead
        self._source, self._look = known.source, known.look
        if store is not None:
            if source := line.held.get(known.source):
                os.dup2(source[0], store.fd, inheritable=False)
            if known.look is not None:
                store.remember(self._arena.get(known.look))
        images = self._adopt_images(known, self._adopt_layers(known, line), line, store)
        self._adopt_numbers(known, images)
        self._adopt_handles(known, images, line)
        used = {self._source, *self._files.values(), *(held for held, _ in self._held.values())}
        for held in line.held.keys() - used:
            for fd in line.held[held]:
                os.close(fd)
            line.drop(held)
        places = {*self._merged.values(), *(place for _, place in self._held.values())}
        self._arena.free_all_but({*places, *([self._look] if self._look else [])})

    def _adopt_layers(self, known: Known, line: Line) -> dict[int, Layer]:
        layers = {**self._inherited_layers}
        for number, (held, place) in known.layers.items():
            fds = line.held.get(held)
            if fds and number in known.facts:
                extents = functools.partial(self._arena.get, place)
                layer = layers[number] = Layer.restored(known.facts[number], fds[0], extents)
                self._add_layer(layer, number, held, place)
        for number, layer in self._inherited_layers.items():
            if facts := known.facts.get(number):
                layer.fingerprint, layer.tainted = facts.fingerprint, facts.tainted
        return layers

    def _adopt_images(
        self, known: Known, layers: dict[int, Layer], line: Line, store: Store | None
    ) -> dict[int, OpenImage]:
        images = {**self._inherited}
        views: dict[Place, MergedView] = {}
        for number, facts in known.images.items():
            if not all(n in layers for n in facts.layers):
                continue
            place = facts.merged
            view = views.get(place)
            if view is None:
                merged = functools.partial(self._arena.get, place)
                view = MergedView.restored([layers[n] for n in facts.layers], merged)
                views[place], self._merged[view] = view, place
                self._when_gone(view, self._arena.free, place)
            image = images[number] = OpenImage(
                facts.name, view, facts.access, facts.visible, facts.mtime_ns, facts.tag
            )
            self._add_image(image, number, facts)
            if store is not None and facts.keys is not None:
                store.adopt(facts.tag, facts.keys, image)
        return images

    def _adopt_numbers(self, known: Known, images: dict[int, OpenImage]) -> None:
        for number, (node, lookups) in known.nodes.items():
            if not isinstance(node, ImageNode):
                self._inodes.restore(number, node, lookups)
            elif node.image in images:
                self._inodes.restore(number, MemoryFile(images[node.image]), lookups)
        self._inodes.fresh = max(self._inodes.fresh, known.fresh)

    def _adopt_handles(self, known: Known, images: dict[int, OpenImage], line: Line) -> None:
        contents = {}
        wanted = {facts.content for facts in known.opened.values()}
        for number in wanted & known.contents.keys():
            node, parts = known.contents[number]
            with contextlib.suppress(OSError):
                contents[number] = self._handles.shared(node, *parts)
                self._contents[contents[number]] = number
        for number, facts in known.opened.items():
            content = contents.get(facts.content)
            handle = Handle(
                image=images.get(facts.image),
                text=None if facts.is_folder else content,
                names=content if facts.is_folder else None,
                node=facts.node,
                key=facts.key,
            )
            if fds := line.held.get(facts.held):
                handle.fd = fds[0]
                self._files[number] = facts.held
            self._handles.by_number[number] = handle
