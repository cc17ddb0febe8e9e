"""Which bytes a guest finds in its memory, whatever it does meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.extents import Extent
from diffmergefs.uffd.memory import Ended, Unservable
from diffmergefs.uffd.userfault import Pending, Room
from tests.support.images import PAGE
from tests.unit.uffd.conftest import ORACLE, SIZE, Guest

ZEROS = bytes(PAGE)
Make = Callable[..., Guest]


def page(number: int, count: int = 1) -> bytes:
    return ORACLE[number * PAGE : (number + count) * PAGE]


@pytest.mark.parametrize("around", [PAGE, 4 * PAGE, SIZE, 2 << 20])
@pytest.mark.parametrize("sizes", [(SIZE,), (24 * PAGE, 40 * PAGE)])
def test_the_guest_finds_the_images_bytes(guest: Make, around: int, sizes: tuple[int]) -> None:
    served = guest(*sizes, around=around)
    for number in (63, 2, 30, 0, 20, 24):
        assert served.read(number) == page(number)
    assert b"".join(served.read(n) for n in range(64)) == ORACLE


def test_the_block_about_a_fault_comes_with_it_and_no_more(guest: Make) -> None:
    served = guest(around=4 * PAGE)
    served.read(6)
    assert (served.counters.faults, served.counters.copied_bytes) == (1, 4 * PAGE)
    served.read(4, 4)
    assert served.counters.faults == 1
    served.read(8)
    assert served.counters.faults == 2


def test_holes_become_zeros_without_a_copy(guest: Make) -> None:
    served = guest(around=16 * PAGE)
    assert served.read(20) == ZEROS
    # Of pages 16 to 31, the last two are data.
    assert (served.counters.copied_bytes, served.counters.zero_bytes) == (2 * PAGE, 14 * PAGE)
    assert served.read(29, 3) == page(29, 3)
    assert served.counters.faults == 1
    assert served.counters.supplied == {-1: 14 * PAGE, 1: 2 * PAGE}


def test_what_is_given_away_reads_as_zeros_and_its_neighbours_do_not(guest: Make) -> None:
    served = guest(around=SIZE)
    assert served.serve("give", 4 * PAGE, 2 * PAGE) is None
    assert served.counters.removed_bytes == 2 * PAGE
    assert served.read(3) == page(3)
    assert served.read(0, 64) == page(0, 4) + 2 * ZEROS + page(6, 58)
    served.serve("write", 4 * PAGE, "aa" * PAGE)
    served.serve("give", 4 * PAGE, PAGE)
    assert served.read(4) == ZEROS


def test_what_is_given_away_unseen_reads_as_zeros_too(guest: Make) -> None:
    served = guest(events=False)
    assert served.read(4) == page(4)
    served.serve("give", 4 * PAGE, PAGE)
    assert served.read(4) == ZEROS
    assert served.read(5) == page(5)


def test_a_page_that_was_read_before_it_was_given_away_is_not_put_in_place(
    guest: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = guest()
    served.start("read", 3 * PAGE, PAGE)
    fill = served.view.fill
    given: list[object] = []

    def late(*arguments: object) -> None:
        fill(*arguments)  # type: ignore[arg-type]
        if not given:
            given.append(served.vmm.ask("start", "give", 3 * PAGE, PAGE))
            served.wait()

    monkeypatch.setattr(served.view, "fill", late)
    served.memory.serve()
    assert served.memory.is_waiting and served.counters.retries == 1
    assert served.counters.copied_bytes == 0
    found = served.serve("join")
    assert isinstance(found, list) and bytes.fromhex(found[0]) == ZEROS


def test_pages_are_given_away_before_the_faults_that_are_read_with_them(guest: Make) -> None:
    served = guest(around=SIZE)
    served.start("read", 3 * PAGE, PAGE)
    served.vmm.ask("start", "give", 5 * PAGE, PAGE)
    assert served.vmm.ask("start", "read", 6 * PAGE, PAGE) is None
    found = served.serve("join")
    assert isinstance(found, list)
    assert [bytes.fromhex(found[0]), bytes.fromhex(found[2])] == [page(3), page(6)]
    assert served.read(5) == ZEROS


def test_a_page_that_is_there_already_is_left_as_it_is(guest: Make) -> None:
    served = guest(around=SIZE)
    room = Room(PAGE)
    room.buffer[:] = b"\xaa" * PAGE
    start = served.vmm.regions[0]["base_host_virt_addr"]
    for number in (0, 5, 6, 18, 63):
        assert served.source.copy(start + number * PAGE, room.address, PAGE) == PAGE
    assert served.read(7) == page(7)
    found = served.read(0, 64)
    assert served.counters.faults == 1
    for number in range(64):
        there = number in (0, 5, 6, 18, 63)
        assert found[number * PAGE :][:PAGE] == (b"\xaa" * PAGE if there else page(number))


def test_pages_are_put_in_place_ahead_unless_they_were_given_away(guest: Make) -> None:
    served = guest(24 * PAGE, 40 * PAGE)
    served.read(1)
    served.serve("give", 5 * PAGE, PAGE)
    served.memory.ahead(0, 28 * PAGE)
    assert served.counters.ahead_bytes == 26 * PAGE
    assert served.vmm.read(0, 5 * PAGE) == page(0, 5)
    faults = served.counters.faults
    assert served.read(0, 28) == page(0, 5) + ZEROS + page(6, 22)
    assert served.counters.faults == faults + 1


def test_nothing_is_put_in_place_ahead_while_an_event_waits(guest: Make) -> None:
    served = guest()
    served.start("give", 5 * PAGE, PAGE)
    with pytest.raises(Pending):
        served.memory.ahead(0, SIZE)
    served.serve("join")
    served.memory.ahead(0, SIZE)
    assert served.read(0, 64) == page(0, 5) + ZEROS + page(6, 58)


def test_touches_are_told_by_their_places_in_the_image(guest: Make) -> None:
    served = guest(24 * PAGE, 40 * PAGE)
    told = []
    served.memory.touched = lambda offset, length: told.append(Extent(offset, offset + length))
    for number in (30, 1):
        served.read(number)
    served.serve("give", PAGE, PAGE)
    served.read(1)
    served.memory.ahead(0, SIZE)
    assert told == [Extent(30 * PAGE, 31 * PAGE), Extent(PAGE, 2 * PAGE)]


def test_a_layer_that_changed_supplies_no_byte(guest: Make, layers: tuple[Path, Path]) -> None:
    served = guest()
    assert served.read(0) == page(0)
    with layers[0].open("r+b") as file:
        file.write(b"\xaa" * SIZE)
        os.fsync(file.fileno())
    served.start("read", 1 * PAGE, PAGE)
    with pytest.raises(Unservable, match=f"{layers[0]}: the layer changed while in use"):
        served.memory.serve()
    assert served.counters.copied_bytes == PAGE


def test_the_end_of_the_process_is_no_failure(guest: Make) -> None:
    served = guest()
    served.vmm.process.kill()
    served.vmm.process.wait()
    with pytest.raises(Ended):
        served.memory.ahead(0, SIZE)
