"""Page servers (`diffmergefs uffd`) for guests with pages of 4 KiB and of 2 MiB."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.bench.goals import UFFD, UFFD_HUGE, UFFD_RECORDED
from tests.bench.measure import NotMeasured, Record
from tests.bench.microvms import MEBIBYTES, Memory, MicroVm, take_apart
from tests.support import hugepages, pageservers

#: Huge pages of a guest that is restored: its working set, and what it needs besides.
_TOUCHED = 24


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """So many huge pages, reserved; NotMeasured where they cannot be had."""
    with ExitStack() as stack:
        try:
            stack.enter_context(hugepages.reserved(count))
        except pytest.skip.Exception as error:
            raise NotMeasured(str(error)) from error
        yield


def take_huge(directory: Path) -> MicroVm:
    """A guest with huge pages, taken apart; NotMeasured where there are none."""
    with huge_pages(MEBIBYTES // 2 + 8):
        return take_apart(directory, huge=True)


def memories(
    stack: ExitStack,
    vm: MicroVm,
    huge: Callable[[], MicroVm],
    sets: Path,
    count: int,
    record: Record,
) -> list[Memory]:
    """The memories that page servers give to `count` VMs at once, while the stack is there.

    `sets` has the working set of a restore of `vm`.
    """
    found: list[Memory] = []

    def serve(name: str, of: Callable[[], MicroVm], *options: str) -> None:
        try:
            served = of()
            place = Path(tempfile.mkdtemp(prefix="uffd-", dir=served.directory))
            socket = place / "socket"
            stack.enter_context(pageservers.serving(socket, *options, *served.chain.options))
            found.append(Memory(served, name, socket, kind="Uffd"))
        except Exception as error:
            record.miss(name, error)

    def recorded() -> MicroVm:
        if not list(sets.glob("*.json")):
            raise NotMeasured("no working set was recorded")
        return vm

    def with_pages() -> MicroVm:
        made = huge()
        stack.enter_context(huge_pages(count * _TOUCHED))
        return made

    serve(UFFD, lambda: vm, "--no-prefetch")
    serve(UFFD_RECORDED, recorded, f"--working-set-dir={sets}")
    serve(UFFD_HUGE, with_pages, "--no-prefetch")
    return found
