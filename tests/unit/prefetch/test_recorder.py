"""Who counts as a restore, each byte at its first touch, and what is saved of it."""

from __future__ import annotations

import gc
import logging
import os
import random
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given

from diffmergefs.core.errors import LayerChangedError
from diffmergefs.core.extents import Extent
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.prefetch import recorder as recorders
from diffmergefs.prefetch.record import WorkingSet, WorkingSets, identity_of_view
from diffmergefs.prefetch.recorder import Recorder, Touches, first_touches
from tests.support.images import PAGE
from tests.support.logged import messages
from tests.support.restores import (
    PAGES,
    RUNS,
    SIZE,
    Client,
    image,
    ranges_of,
    scattered,
    sets,
    shown,
    write_pair,
)

__all__ = ["image", "sets"]


@pytest.fixture
def recorder(sets: WorkingSets) -> Recorder:
    return Recorder(sets)


def recorded(sets: WorkingSets, image: OpenImage) -> WorkingSet | None:
    return sets.load(identity_of_view(image.view))


def test_first_touches_are_recorded_in_order_at_the_last_close(
    recorder: Recorder, sets: WorkingSets, image: OpenImage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    recorder.ready(4)
    touched = scattered(100)
    client = Client(recorder, image)
    client.touch(*touched, *touched[::-1])
    assert recorded(sets, image) is None
    assert client.close()
    found = recorded(sets, image)
    assert found is not None
    assert list(found.ranges) == ranges_of(touched)
    assert found.readahead_kib == 4 and found.stale(identity_of_view(image.view)) is None
    (line,) = messages(caplog)
    assert f"recorded the first touch of {100 * PAGE} bytes in 100 ranges: " in line


def test_a_quarter_of_the_image_is_recorded_at_most(
    recorder: Recorder, sets: WorkingSets, image: OpenImage
) -> None:
    touched = scattered(PAGES // 2)
    client = Client(recorder, image)
    client.touch(*touched)
    client.close()
    found = recorded(sets, image)
    assert found is not None and list(found.ranges) == ranges_of(touched[: PAGES // 4])


def test_a_reader_in_order_leaves_no_record(
    recorder: Recorder, sets: WorkingSets, image: OpenImage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for step in (1, 32):
        client = Client(recorder, image)
        for start in range(0, PAGES, step):
            recorder.read(client.file, start * PAGE, step * PAGE)
        assert client.close()
    assert recorded(sets, image) is None
    assert ["not recorded: it was read in order" in line for line in messages(caplog)] == [True] * 2


def test_who_only_looks_leaves_an_older_record_alone(
    recorder: Recorder, sets: WorkingSets, image: OpenImage
) -> None:
    client = Client(recorder, image)
    client.touch(*scattered(100))
    client.close()
    before = recorded(sets, image)
    for touched in ((), (0,), (0, PAGES - 1)):
        client = Client(recorder, image)
        client.touch(*touched)
        client.close()
    assert before is not None and recorded(sets, image) == before


def test_a_reader_in_order_beside_a_guest_is_left_out(
    recorder: Recorder, sets: WorkingSets, image: OpenImage
) -> None:
    guest, reader = Client(recorder, image), Client(recorder, image)
    touched = scattered(60)
    for n, page in enumerate(touched):
        guest.touch(page)
        reader.touch(n)
    assert not reader.close()
    assert guest.close()
    found = recorded(sets, image)
    assert found is not None and list(found.ranges) == ranges_of(touched)


def test_guests_that_run_together_have_one_record(
    recorder: Recorder, sets: WorkingSets, image: OpenImage
) -> None:
    touched = scattered(120)
    one, other = Client(recorder, image), Client(recorder, image)
    other.touch(*touched[50:])
    one.touch(*touched[:60])
    assert not one.close()
    assert recorded(sets, image) is None
    assert other.close()
    found = recorded(sets, image)
    assert found is not None and list(found.ranges) == ranges_of(touched)


def test_only_the_first_open_of_an_image_drops_the_kernels_pages(
    recorder: Recorder, image: OpenImage
) -> None:
    one, other = Client(recorder, image), Client(recorder, image)
    assert (one.keeps_cache, other.keeps_cache) == (False, True)
    one.close()
    assert Client(recorder, image).keeps_cache
    other.close()


def test_an_image_whose_layer_changed_leaves_no_record(
    recorder: Recorder, sets: WorkingSets, image: OpenImage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = Client(recorder, image)
    client.touch(*scattered(100))
    os.utime(image.view.layers[1].path)
    with pytest.raises(LayerChangedError):
        image.view.read(3 * PAGE, PAGE)
    client.close()
    assert "not recorded: one of its layers changed" in messages(caplog)[-1]
    assert recorded(sets, image) is None


def test_what_is_open_at_the_end_is_written_then(
    recorder: Recorder, sets: WorkingSets, image: OpenImage
) -> None:
    touched = scattered(50)
    client = Client(recorder, image)
    client.touch(*touched)
    assert recorder.stop(1.0)
    found = recorded(sets, image)
    assert found is not None and list(found.ranges) == ranges_of(touched)
    assert not client.close()
    client.touch(5)
    assert recorder.stop(1.0)


def test_no_more_runs_are_kept_than_a_record_can_hold(
    recorder: Recorder, sets: WorkingSets, image: OpenImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "MAX_RANGES", 40)
    touched = scattered(100)
    one, other = Client(recorder, image), Client(recorder, image)
    one.touch(*touched[:30])
    other.touch(*touched[30:])
    one.close()
    other.close()
    found = recorded(sets, image)
    # The other one has made ten requests only: it is no restore.
    assert found is not None and list(found.ranges) == ranges_of(touched[:30])


def test_glances_take_no_memory_while_a_guest_runs(recorder: Recorder, image: OpenImage) -> None:
    guest = Client(recorder, image)
    guest.touch(*scattered(50))
    for _ in range(100):
        glance = Client(recorder, image)
        glance.touch(0, 9)
        glance.close()
    (session,) = recorder._sessions.values()
    assert len(session.files) == 1 and session.runs == len(session.files[guest.file])
    guest.close()


def test_a_record_that_cannot_be_written_is_a_line_in_the_log(
    tmp_path: Path, image: OpenImage, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    client = Client(Recorder(WorkingSets(str(tmp_path / "file" / "sets"))), image)
    client.touch(*scattered(100))
    client.close()
    (line,) = messages(caplog, logging.WARNING)
    assert "cannot write the record of a working set" in line


def test_what_it_is_not_told_of_is_ignored(recorder: Recorder) -> None:
    recorder.read(99, 0, SIZE)
    assert recorder.closed(99) is None


def test_a_closed_image_is_let_go(recorder: Recorder, tmp_path: Path) -> None:
    image = shown(*write_pair(tmp_path))
    client = Client(recorder, image)
    client.touch(*scattered(100))
    client.close()
    gone = weakref.ref(image)
    del image
    gc.collect()
    assert gone() is None


MIB = 1 << 20
LARGE = 512 * MIB


def touched(requests: Sequence[tuple[int, int]], size: int = LARGE) -> Touches:
    touches = Touches(size)
    for offset, length in requests:
        touches.add(offset, length)
    return touches


def in_order(size: int = LARGE, length: int = 128 << 10) -> list[tuple[int, int]]:
    return [(offset, length) for offset in range(0, size, length)]


def random_pages(count: int, size: int = LARGE, seed: int = 1) -> list[tuple[int, int]]:
    dice = random.Random(seed)
    return [(dice.randrange(size // PAGE) * PAGE, PAGE) for _ in range(count)]


def overtaking(requests: Sequence[tuple[int, int]], by: int) -> list[tuple[int, int]]:
    """Each group of so many in a random order, as several workers of a copier make them."""
    dice = random.Random(7)
    groups = [list(requests[n : n + by]) for n in range(0, len(requests), by)]
    for group in groups:
        dice.shuffle(group)
    return [request for group in groups for request in group]


@pytest.mark.parametrize("length", [PAGE, 128 << 10, MIB])
def test_a_reader_in_order_is_no_restore(length: int) -> None:
    touches = touched(in_order(length=length))
    assert not touches.is_restore
    assert list(touches) == [(0, LARGE)]


def test_a_copier_whose_requests_overtake_each_other_is_no_restore() -> None:
    assert not touched(overtaking(in_order(length=MIB), by=8)).is_restore


def test_a_glance_is_no_restore() -> None:
    assert not touched([]).is_restore
    assert not touched([(0, PAGE)]).is_restore
    assert not touched([(0, PAGE), (LARGE - PAGE, PAGE), (LARGE // 2, PAGE)]).is_restore


def test_a_reader_in_order_who_looks_back_now_and_then_is_no_restore() -> None:
    requests = in_order(length=MIB)
    for n in range(500, 0, -25):
        requests.insert(n, (0, PAGE))
    assert not touched(requests).is_restore


@pytest.mark.parametrize("size", [4 * MIB, 16 * MIB, LARGE, 64 << 30])
def test_a_guest_here_and_there_is_a_restore(size: int) -> None:
    assert touched(random_pages(200, size), size).is_restore


def test_a_guest_that_the_kernel_reads_ahead_for_is_a_restore() -> None:
    requests = [(offset // MIB * MIB, 128 << 10) for offset, _ in random_pages(150)]
    assert touched(requests).is_restore


def test_a_guest_that_then_runs_through_a_quarter_of_its_memory_is_a_restore() -> None:
    assert touched(random_pages(300) + in_order(LARGE // 4)).is_restore


def test_requests_are_runs_of_whole_pages_within_the_image() -> None:
    touches = touched([(10, 20), (PAGE, 1), (5 * PAGE, PAGE), (PAGE - 1, 2)], 5 * PAGE + 100)
    assert list(touches) == [(0, 2 * PAGE), (5 * PAGE, 5 * PAGE + 100), (0, 2 * PAGE)]
    assert len(touches) == 3


def test_adding_says_how_many_runs_it_made() -> None:
    touches = Touches(8 * PAGE)
    added = [touches.add(offset * PAGE, PAGE) for offset in (0, 1, 2, 5, 3)]
    assert added == [1, 0, 0, 1, 1]
    assert touches.add(8 * PAGE, PAGE) == 0 and touches.add(0, 0) == 0
    assert len(touches) == 3


# Named by what a later run does to an earlier one.
OVERLAPS = {
    "same": ([(2, 4), (2, 4)], [(2, 4)]),
    "inside": ([(0, 9), (3, 5)], [(0, 9)]),
    "head": ([(4, 8), (2, 6)], [(4, 8), (2, 4)]),
    "tail": ([(4, 8), (6, 9)], [(4, 8), (8, 9)]),
    "both": ([(4, 6), (2, 8)], [(4, 6), (2, 4), (6, 8)]),
    "swallow many": ([(1, 2), (5, 6), (0, 8)], [(1, 2), (5, 6), (0, 1), (2, 5), (6, 8)]),
    "adjacent": ([(4, 6), (2, 4)], [(4, 6), (2, 4)]),
    "none": ([], []),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_a_byte_counts_where_it_came_first(name: str) -> None:
    runs, expected = OVERLAPS[name]
    assert first_touches([Extent(*run) for run in runs]) == expected


@given(RUNS)
def test_first_touches_are_those_of_a_byte_by_byte_walk(runs: list[Extent]) -> None:
    order: dict[int, None] = {}
    for start, stop in runs:
        order.update(dict.fromkeys(range(start, stop)))
    found = [n for start, stop in first_touches(runs) for n in range(start, stop)]
    assert found == list(order)
