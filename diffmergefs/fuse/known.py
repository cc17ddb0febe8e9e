"""What a journal says: each fact as its last record has it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from diffmergefs.core.identity import FileKey
from diffmergefs.core.layer import LayerFacts
from diffmergefs.fuse.access import Access
from diffmergefs.fuse.arena import Place
from diffmergefs.fuse.journal import Record
from diffmergefs.fuse.nodes import Node
from diffmergefs.fuse.tags import Keys


class ImageFacts(NamedTuple):
    """An open image in the journal: the numbers of its layers, and the place of their merge."""

    name: str
    access: Access
    visible: int
    mtime_ns: int
    tag: str
    keys: Keys | None
    layers: tuple[int, ...]
    merged: Place


class ImageNode(NamedTuple):
    """Stands in the journal for the `MemoryFile` of the image with this number."""

    image: int


class HandleFacts(NamedTuple):
    """An open file or directory in the journal: numbers of its image, held descriptor and content.

    0 stands for none.
    """

    image: int = 0
    held: int = 0
    content: int = 0
    is_folder: bool = False
    node: Node | None = None
    key: FileKey | None = None


class Known:
    """The facts in these records, by their numbers.

    A record may come twice, and one about a thing that is gone changes nothing. `held` numbers are
    those of the keeper.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.readahead: int | None = None
        self.fresh = 0
        self.source = 0
        self.look: Place | None = None
        self.layers: dict[int, tuple[int, Place]] = {}
        self.facts: dict[int, LayerFacts] = {}
        self.images: dict[int, ImageFacts] = {}
        self.nodes: dict[int, tuple[Node | ImageNode, int]] = {}
        self.contents: dict[int, tuple[Node | None, tuple[bytes, ...]]] = {}
        self.opened: dict[int, HandleFacts] = {}
        for kind, *rest in records:
            getattr(self, f"_{kind}")(*rest)

    def _tuned(self, readahead: int) -> None:
        self.readahead = readahead

    def _fresh(self, number: int) -> None:
        self.fresh = max(self.fresh, number)

    def _source(self, held: int) -> None:
        self.source = held

    def _look(self, place: Place) -> None:
        self.look = place

    def _layer(self, number: int, held: int, extents: Place) -> None:
        self.layers[number] = held, extents

    def _facts(self, number: int, facts: LayerFacts) -> None:
        self.facts[number] = facts

    def _image(self, number: int, facts: ImageFacts) -> None:
        self.images[number] = facts

    def _gone(self, number: int) -> None:
        self.layers.pop(number, None)
        self.facts.pop(number, None)
        self.images.pop(number, None)

    def _lookups(self, number: int, node: Node | ImageNode | None, lookups: int) -> None:
        self.fresh = max(self.fresh, number + 1)
        if node is None and number in self.nodes:
            node = self.nodes[number][0]
        if lookups <= 0 or node is None:
            self.nodes.pop(number, None)
        else:
            self.nodes[number] = node, lookups

    def _content(self, number: int, node: Node | None, parts: tuple[bytes, ...]) -> None:
        self.contents[number] = node, parts

    def _opened(self, number: int, facts: HandleFacts) -> None:
        self.opened[number] = facts

    def _closed(self, number: int) -> None:
        self.opened.pop(number, None)
