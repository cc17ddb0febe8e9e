"""A small image, and a process that plays a VMM, connected."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from diffmergefs.core.view import MergedView
from diffmergefs.opening.images import open_chain
from diffmergefs.uffd.handshake import received
from diffmergefs.uffd.memory import Memory
from diffmergefs.uffd.status import Counters
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.vmm import Vmm

SIZE = 64 * PAGE
BASE = [(0, signed(0, 0, 16 * PAGE)), (40 * PAGE, signed(0, 40 * PAGE, 24 * PAGE))]
DIFF = [(2 * PAGE, signed(1, 2 * PAGE, PAGE)), (30 * PAGE, signed(1, 30 * PAGE, 2 * PAGE))]
#: What the image holds: data up to page 16, from 30 to 32, and from 40 on.
ORACLE = overlay_oracle(SIZE, [BASE, DIFF])


class Guest:
    """A VMM whose memory a `Memory` serves: `serve` acts on what waits."""

    def __init__(self, vmm: Vmm, view: MergedView, path: Path, around: int) -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen()
            vmm.connect(path)
            connection, _ = listening.accept()
        path.unlink()
        with connection:
            regions, self.source = received(connection, view.size)
        self.vmm = vmm
        self.view = view
        self.counters = Counters()
        self.memory = Memory(view, regions, self.source, around, self.counters)

    def wait(self) -> None:
        """Wait until an event waits to be read."""
        assert select.select([self.source.fd], [], [], 30)[0]

    def serve(self, *command: object) -> object:
        """The answer to a command, all of whose faults and events are served."""
        self.vmm.send(*command)
        while self.vmm.is_stuck(0.01):
            self.memory.serve()
        return self.vmm.answer()

    def read(self, page: int, count: int = 1) -> bytes:
        """The guest's bytes of these pages."""
        found = self.serve("read", page * PAGE, count * PAGE)
        assert isinstance(found, str)
        return bytes.fromhex(found)

    def start(self, *command: object) -> None:
        """Have a thread of the guest begin a command, and wait for its event."""
        assert self.vmm.ask("start", *command) is None
        self.wait()


@pytest.fixture
def layers(tmp_path: Path) -> tuple[Path, Path]:
    return write_layer(tmp_path / "base", SIZE, BASE), write_layer(tmp_path / "diff", SIZE, DIFF)


@pytest.fixture
def view(layers: tuple[Path, Path]) -> Iterator[MergedView]:
    with open_chain(layers[0], layers[1:]).view as found:
        yield found


@pytest.fixture
def guest(view: MergedView, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """A function that makes a guest with regions of these sizes."""
    with ExitStack() as made:

        def make(*sizes: int, around: int = PAGE, events: bool = True) -> Guest:
            vmm = made.enter_context(Vmm(*(sizes or (SIZE,)), events=events))
            found = Guest(vmm, view, tmp_path / "socket", around)
            made.callback(found.source.close)
            return found

        yield make
