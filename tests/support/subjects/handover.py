"""Servers of one mount, one after another, in this process: what one knew is known by the next."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import cast

import pytest

from diffmergefs.fuse import handover
from diffmergefs.fuse.arena import Arena
from diffmergefs.fuse.handles import Handle, Handles
from diffmergefs.fuse.handover import Handover
from diffmergefs.fuse.journal import Journal
from diffmergefs.fuse.nodes import Inodes, MemoryFile, OpenImage
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.tree import Tree
from diffmergefs.system.board import Board, Mark
from diffmergefs.system.line import Line
from tests.support.subjects.served import looked

Held = dict[int, list[int]]


class FakeLine:
    """A server's line, whose keeper is the dictionary `kept`. With `fails` nothing can be held."""

    suspects: frozenset[Mark] = frozenset()
    reason = ""
    keeper = 1
    is_held = True

    def __init__(self, number: int, kept: Held, board: Board) -> None:
        self.number, self.board = number, board
        self.poisoned: dict[Mark, float] = {}
        self.cleared: list[Mark] = []
        self.clear = self.cleared.append
        self.kept = kept
        self.held = {n: list(map(os.dup, fds)) for n, fds in kept.items()}
        self.fails: OSError | None = None
        self._next = (number << 32) + 1

    def hold(self, *fds: int) -> int:
        if self.fails is not None:
            raise self.fails
        self._next += 1
        self.kept[self._next] = list(map(os.dup, fds))
        return self._next

    def drop(self, number: int) -> None:
        for fd in self.kept.pop(number, []):
            os.close(fd)


class Server:
    """One server: what it knows, and the requests that a kernel makes of it."""

    def __init__(self, line: FakeLine, store: Store | None, known: Handover) -> None:
        self.line = line
        self.store = store
        self.inodes, self.handles, self.handover = Inodes(), Handles(), known
        self.wakes: list[str] = []
        known.wake = lambda: self.wakes.append("")
        known.begin(cast(Line, line), self.inodes, self.handles, store)

    @property
    def tree(self) -> Tree:
        assert self.store is not None
        return Tree("/somewhere", self.store)

    def open(self, tag: str) -> int:
        """Look a tag's memory up and open it; the handle."""
        assert self.store is not None
        return self.open_image(self.store.open(tag))

    def open_image(self, image: OpenImage) -> int:
        self.inodes.look_up(self.inodes.number(MemoryFile(image)))
        return self.handles.add(Handle(image=image))

    def read(self, handle: int) -> bytes:
        found = self.handles.by_number[handle]
        assert found.view is not None
        return bytes(found.view.read(0, found.view.size))

    def close(self, handle: int) -> None:
        found = self.handles.remove(handle)
        assert found is not None
        if found.fd is not None:
            os.close(found.fd)

    def tend(self) -> None:
        """Let go of what is gone."""
        gc.collect()
        self.handover.tend()


class Mount:
    """The servers of a mount of `root` (None: of an explicit image), and their keeper.

    Each server begins with what the keeper knew: a store that was looked over once.
    """

    def __init__(
        self, root: Path | None, patch: pytest.MonkeyPatch, explicit: OpenImage | None = None
    ) -> None:
        self.board = Board()
        self.kept: Held = {}
        self.explicit = explicit
        self.started = 0
        self.journal, self.arena = Journal(self.board), Arena(self.board)
        self._stores = [looked(root) for _ in range(4)] if root else []
        patch.setattr(handover, "Journal", lambda board: self.journal)
        patch.setattr(handover, "Arena", lambda board: self.arena)

    def server(self, kept: Held | None = None) -> Server:
        """The next server; the one before may do nothing more."""
        return Server(self.line(kept), self.store(), self.handover())

    def line(self, kept: Held | None = None) -> FakeLine:
        """The line of the next server."""
        self.started += 1
        return FakeLine(self.started, self.kept if kept is None else kept, self.board)

    def store(self) -> Store | None:
        """SOURCE as the next server has it from the keeper."""
        return self._stores.pop(0) if self._stores else None

    def handover(self) -> Handover:
        """What the next server has of it from the keeper."""
        known = Handover(self.board)
        if self.explicit is not None:
            known.inherit(self.explicit)
        return known

    def copy(self) -> Held:
        """Copies of all that is held."""
        return {number: list(map(os.dup, fds)) for number, fds in self.kept.items()}

    def close(self) -> None:
        for fds in self.kept.values():
            for fd in fds:
                os.close(fd)
