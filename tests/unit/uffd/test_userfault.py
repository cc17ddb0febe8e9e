"""The kernel's side: what its answers mean."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from diffmergefs.uffd.userfault import PAGEFAULT, REMOVE, Pending, Room, Userfault
from tests.support.images import PAGE
from tests.unit.uffd.conftest import Guest

Make = Callable[..., Guest]


def test_only_a_userfaultfd_is_taken() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(ValueError, match="not a userfaultfd"):
            Userfault(reader)
    finally:
        os.close(reader)
        os.close(writer)


def test_faults_and_what_is_given_away_are_events(guest: Make) -> None:
    served = guest()
    start = served.vmm.regions[0]["base_host_virt_addr"]
    assert served.source.events() == []
    served.start("read", 3 * PAGE, PAGE)
    ((kind, _, address, _),) = served.source.events()
    assert (kind, address // PAGE) == (PAGEFAULT, start // PAGE + 3)
    assert served.source.zero(start + 3 * PAGE, PAGE) == PAGE
    served.start("give", 4 * PAGE, 2 * PAGE)
    assert [event[:3] for event in served.source.events()] == [
        (REMOVE, start + 4 * PAGE, start + 6 * PAGE)
    ]
    served.vmm.ask("join")


def test_a_copy_ends_before_a_page_that_is_there(guest: Make) -> None:
    source, start = (served := guest()).source, served.vmm.regions[0]["base_host_virt_addr"]
    room = Room(8 * PAGE)
    room.buffer[:] = bytes(range(1, 9)) * PAGE
    assert source.copy(start + 3 * PAGE, room.address, PAGE) == PAGE
    assert source.copy(start, room.address, 8 * PAGE) == 3 * PAGE
    assert source.copy(start + 3 * PAGE, room.address, PAGE) == 0
    assert source.zero(start + 2 * PAGE, 2 * PAGE) == 0
    assert source.zero(start + 4 * PAGE, PAGE) == PAGE
    assert served.vmm.read(0, 5 * PAGE) == bytes(room.buffer[: 3 * PAGE]) + bytes(
        room.buffer[:PAGE]
    ) + bytes(PAGE)


def test_nothing_is_put_in_place_while_an_event_waits(guest: Make) -> None:
    source, start = (served := guest()).source, served.vmm.regions[0]["base_host_virt_addr"]
    room = Room(PAGE)
    served.start("give", PAGE, PAGE)
    with pytest.raises(Pending):
        source.copy(start, room.address, PAGE)
    with pytest.raises(Pending):
        source.zero(start, PAGE)
    assert len(source.events()) == 1
    served.vmm.ask("join")
    assert source.copy(start, room.address, PAGE) == PAGE


def test_whoever_waits_for_a_page_that_is_there_is_woken(guest: Make) -> None:
    source, start = (served := guest()).source, served.vmm.regions[0]["base_host_virt_addr"]
    source.zero(start, PAGE)
    source.wake(start, PAGE)
    assert served.vmm.read(0, PAGE) == bytes(PAGE)


def test_other_answers_are_errors(guest: Make) -> None:
    served = guest()
    start = served.vmm.regions[0]["base_host_virt_addr"]
    with pytest.raises(OSError) as outside:
        served.source.zero(PAGE, PAGE)
    assert outside.value.errno == errno.ENOENT
    served.vmm.process.kill()
    served.vmm.process.wait()
    with pytest.raises(OSError) as ended:
        served.source.zero(start, PAGE)
    assert ended.value.errno == errno.ESRCH


def test_a_room_begins_on_a_page() -> None:
    room = Room(2 * PAGE)
    assert room.address % PAGE == 0
    assert bytes(room.buffer) == bytes(2 * PAGE)
