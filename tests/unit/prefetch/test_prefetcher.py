"""What is pushed into the page cache, when, in which thread, and when no more."""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.core.extents import Extent, ExtentList
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.prefetch import prefetcher as module
from diffmergefs.prefetch.prefetcher import Prefetcher
from diffmergefs.prefetch.push import PIECE, Notify, Push, pieces
from diffmergefs.prefetch.record import WorkingSets, identity_of_view
from tests.support.calls import first
from tests.support.images import PAGE
from tests.support.live import until
from tests.support.logged import messages
from tests.support.restores import (
    ORACLE,
    PAGES,
    SIZE,
    Client,
    image,
    ranges_of,
    save,
    scattered,
    sets,
    shown,
    write_pair,
)

__all__ = ["image", "sets"]

TOUCHED = scattered(40)
WANTED = pieces(ranges_of(TOUCHED), SIZE)


class Kernel:
    """Takes what is pushed; while `gate` is closed a push waits in it."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, bytes]] = []
        self.threads: set[threading.Thread] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Event()
        self.error: OSError | None = None

    def store(self, inode: int, offset: int, data: bytes) -> None:
        self.threads.add(threading.current_thread())
        self.inside.set()
        assert self.gate.wait(20)
        if self.error:
            raise self.error
        self.calls.append((inode, offset, bytes(data)))

    @property
    def ranges(self) -> list[Extent]:
        return [Extent(offset, offset + len(data)) for _, offset, data in self.calls]


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def prefetcher(sets: WorkingSets, kernel: Kernel) -> Iterator[Prefetcher]:
    found = Prefetcher(sets, Notify(kernel.store))
    yield found
    kernel.gate.set()
    assert found.stop(20)


def is_idle(prefetcher: Prefetcher) -> bool:
    with prefetcher._changed:
        return not prefetcher._queue and prefetcher._busy is None


def settle(prefetcher: Prefetcher) -> None:
    until(lambda: is_idle(prefetcher), "it pushes on and on")


def pushing(prefetcher: Prefetcher, sets: WorkingSets, image: OpenImage, kernel: Kernel) -> Client:
    """A client of an image with a record, whose push waits in the kernel."""
    save(sets, image, TOUCHED)
    kernel.gate.clear()
    client = Client(prefetcher, image)
    assert kernel.inside.wait(20)
    return client


def test_what_is_recorded_is_pushed_when_the_image_is_opened(
    prefetcher: Prefetcher,
    sets: WorkingSets,
    image: OpenImage,
    kernel: Kernel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    save(sets, image, TOUCHED)
    client = Client(prefetcher, image)
    assert client.keeps_cache
    settle(prefetcher)
    assert kernel.ranges == WANTED
    for inode, offset, data in kernel.calls:
        assert inode == 7 and offset % PAGE == 0 and len(data) <= PIECE
        assert data == ORACLE[offset : offset + len(data)]
    line = f"prefetched {len(TOUCHED) * PAGE} bytes in {len(WANTED)} pieces"
    assert [line in text for text in messages(caplog)] == [True]
    assert (prefetcher.pushes, prefetcher.pushed_bytes) == (1, len(TOUCHED) * PAGE)
    assert not client.close()


def test_what_was_brought_and_not_asked_for_is_a_hit_at_the_last_close(
    prefetcher: Prefetcher, sets: WorkingSets, image: OpenImage
) -> None:
    save(sets, image, TOUCHED)
    ranges = list(ExtentList(sorted(WANTED)))
    asked = ranges[3]
    clients = [Client(prefetcher, image) for _ in range(2)]
    settle(prefetcher)
    assert prefetcher.hit_bytes == 0
    clients[0].touch(asked.start // PAGE)
    clients[1].touch(next(n for n in range(PAGES) if n not in TOUCHED))
    clients[0].close()
    assert prefetcher.hit_bytes == 0
    clients[1].close()
    assert prefetcher.hit_bytes == len(TOUCHED) * PAGE - (asked.stop - asked.start)
    client = Client(prefetcher, image)
    client.touch(asked.start // PAGE)  # so the kernel has dropped it: all is brought once more
    settle(prefetcher)
    before = prefetcher.hit_bytes
    client.close()
    assert prefetcher.hit_bytes == before + len(TOUCHED) * PAGE


def test_what_was_not_brought_to_its_end_is_no_hit(
    prefetcher: Prefetcher, sets: WorkingSets, image: OpenImage, kernel: Kernel
) -> None:
    client = pushing(prefetcher, sets, image, kernel)
    work = prefetcher.closed(client.file)
    kernel.gate.set()
    assert work is not None
    work()
    assert (prefetcher.pushes, prefetcher.hit_bytes) == (0, 0)


def test_only_a_worker_thread_pushes_and_it_is_one(
    prefetcher: Prefetcher, sets: WorkingSets, tmp_path: Path, kernel: Kernel
) -> None:
    clients = []
    for n in range(3):
        (tmp_path / f"{n}").mkdir()
        image = shown(*write_pair(tmp_path / f"{n}"))
        save(sets, image, TOUCHED)
        clients.append(Client(prefetcher, image))
    settle(prefetcher)
    (worker,) = kernel.threads
    assert worker is not threading.current_thread() and worker.daemon
    assert len(kernel.calls) == 3 * len(WANTED)
    for client in clients:
        client.close()


def test_images_that_are_opened_together_are_pushed_in_turn(
    prefetcher: Prefetcher, sets: WorkingSets, tmp_path: Path, kernel: Kernel
) -> None:
    kernel.gate.clear()
    for n in range(2):
        (tmp_path / f"{n}").mkdir()
        image = shown(*write_pair(tmp_path / f"{n}"))
        save(sets, image, TOUCHED)
        prefetcher.opened(n, n, image, 1, writing=False)
    kernel.gate.set()
    settle(prefetcher)
    order = [inode for inode, _, _ in kernel.calls]
    assert order.index(1) < 5 and order[-5:].count(0) >= 1


def test_no_more_than_a_quarter_is_pushed(
    prefetcher: Prefetcher, sets: WorkingSets, image: OpenImage, kernel: Kernel
) -> None:
    save(sets, image, range(PAGES))
    Client(prefetcher, image)
    settle(prefetcher)
    assert sum(stop - start for start, stop in kernel.ranges) == SIZE // 4
    assert kernel.ranges == [(n, n + PIECE) for n in range(0, SIZE // 4, PIECE)]


def test_without_a_record_nothing_is_pushed_or_said(
    prefetcher: Prefetcher, image: OpenImage, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    Client(prefetcher, image).touch(*range(9))
    settle(prefetcher)
    assert not kernel.calls and not messages(caplog)


@pytest.mark.parametrize("why", ["stale", "damaged"])
def test_a_record_that_cannot_be_used_is_ignored_and_said_once(
    why: str,
    prefetcher: Prefetcher,
    sets: WorkingSets,
    tmp_path: Path,
    kernel: Kernel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base, diff = write_pair(tmp_path)
    image = shown(base, diff)
    save(sets, image, TOUCHED)
    if why == "stale":
        os.utime(diff)
        image = shown(base, diff)
    else:
        Path(sets.path(identity_of_view(image.view))).write_bytes(b"{}")
    for _ in range(3):
        client = Client(prefetcher, image)
        settle(prefetcher)
        client.close()
    assert not kernel.calls
    (line,) = messages(caplog, logging.WARNING)
    assert ("stale, and ignored: " + str(diff) if why == "stale" else "is ignored") in line


# Several opens


def test_several_opens_are_one_push(
    prefetcher: Prefetcher, sets: WorkingSets, image: OpenImage, kernel: Kernel
) -> None:
    clients = [pushing(prefetcher, sets, image, kernel)]
    clients += [Client(prefetcher, image) for _ in range(5)]
    for client in clients:
        client.touch(*TOUCHED)
    kernel.gate.set()
    settle(prefetcher)
    assert kernel.ranges == WANTED


def test_a_later_open_pushes_again_only_once_the_kernel_has_dropped_pages(
    prefetcher: Prefetcher, sets: WorkingSets, image: OpenImage, kernel: Kernel
) -> None:
    save(sets, image, TOUCHED)
    first = Client(prefetcher, image)
    settle(prefetcher)
    first.close()
    second = Client(prefetcher, image)
    # What was never pushed is asked for by everybody.
    second.touch(*sorted(set(range(PAGES)) - set(TOUCHED)))
    settle(prefetcher)
    assert kernel.ranges == WANTED
    second.touch(TOUCHED[7])
    second.touch(*TOUCHED)
    settle(prefetcher)
    assert kernel.ranges == WANTED * 2
    # One that is already open has been served.
    second.touch(*TOUCHED)
    settle(prefetcher)
    assert kernel.ranges == WANTED * 2
    second.close()


def test_a_record_is_read_again_only_once_it_was_replaced(
    prefetcher: Prefetcher,
    sets: WorkingSets,
    image: OpenImage,
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads: list[object] = []
    load = sets.load
    monkeypatch.setattr(sets, "load", first(loads.append, load))

    def open_and_touch(page: int) -> None:
        client = Client(prefetcher, image)
        client.touch(page)
        settle(prefetcher)
        client.close()

    save(sets, image, TOUCHED)
    for _ in range(3):
        open_and_touch(TOUCHED[0])
    assert kernel.ranges == WANTED * 3 and len(loads) == 1
    kernel.calls.clear()
    others = sorted(set(range(PAGES)) - set(TOUCHED))[:30]
    save(sets, image, others)
    open_and_touch(TOUCHED[0])
    open_and_touch(others[0])
    assert kernel.ranges == pieces(ranges_of(others), SIZE) * 2 and len(loads) == 2
    kernel.calls.clear()
    assert sets.forget(identity_of_view(image.view))
    open_and_touch(others[0])
    open_and_touch(others[0])
    assert not kernel.calls


def test_a_file_for_writing_is_pushed_at_its_first_request(
    prefetcher: Prefetcher, sets: WorkingSets, image: OpenImage, kernel: Kernel
) -> None:
    save(sets, image, TOUCHED)
    client = Client(prefetcher, image, writing=True)
    settle(prefetcher)
    assert not kernel.calls
    client.touch(TOUCHED[0])
    settle(prefetcher)
    assert kernel.ranges == WANTED
    # The mapping of another one drops all of it once more.
    other = Client(prefetcher, image, writing=True)
    other.touch(TOUCHED[0])
    settle(prefetcher)
    assert kernel.ranges == WANTED * 2


def test_a_file_for_writing_begins_a_running_push_anew(
    prefetcher: Prefetcher, sets: WorkingSets, image: OpenImage, kernel: Kernel
) -> None:
    pushing(prefetcher, sets, image, kernel)
    other = Client(prefetcher, image, writing=True)
    other.touch(TOUCHED[0])
    kernel.gate.set()
    settle(prefetcher)
    assert kernel.ranges == [WANTED[0], *WANTED]


def test_the_opens_of_the_way_itself_do_not_count(
    sets: WorkingSets, image: OpenImage, kernel: Kernel
) -> None:
    class Own(Notify):
        def is_own(self, pid: int) -> bool:
            return pid == 5

    save(sets, image, TOUCHED)
    prefetcher = Prefetcher(sets, Own(kernel.store))
    client = Client(prefetcher, image, pid=5)
    client.touch(*TOUCHED)
    assert client.keeps_cache and not client.close()
    assert prefetcher.stop(20) and not kernel.calls


# The end


def ending(work: Callable[[], object] | None) -> threading.Thread:
    assert work is not None
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_the_last_close_stops_the_push_and_waits_for_it(
    prefetcher: Prefetcher, sets: WorkingSets, image: OpenImage, kernel: Kernel
) -> None:
    save(sets, image, TOUCHED)
    kernel.gate.clear()
    one, other = Client(prefetcher, image), Client(prefetcher, image)
    assert kernel.inside.wait(20)
    assert prefetcher.closed(other.file) is None
    closing = ending(prefetcher.closed(one.file))
    closing.join(0.2)
    assert closing.is_alive(), "it did not wait for what was under way"
    kernel.gate.set()
    closing.join(20)
    assert not closing.is_alive()
    settle(prefetcher)
    assert kernel.ranges == WANTED[:1]
    assert (prefetcher.pushes, prefetcher.pushed_bytes) == (0, PAGE)


def test_the_last_close_does_not_wait_for_storage_that_hangs(
    prefetcher: Prefetcher,
    sets: WorkingSets,
    image: OpenImage,
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_LONGEST_WAIT_SECONDS", 0.1)
    client = pushing(prefetcher, sets, image, kernel)
    assert client.close() and not kernel.gate.is_set()


def test_an_image_that_is_opened_again_meanwhile_is_pushed_anew(
    prefetcher: Prefetcher, sets: WorkingSets, image: OpenImage, kernel: Kernel
) -> None:
    client = pushing(prefetcher, sets, image, kernel)
    closing = ending(prefetcher.closed(client.file))
    again = Client(prefetcher, image)
    again.touch(TOUCHED[3])
    kernel.gate.set()
    closing.join(20)
    settle(prefetcher)
    assert kernel.ranges == [WANTED[0], *WANTED]
    again.close()


def test_a_taint_ends_the_push(
    prefetcher: Prefetcher,
    sets: WorkingSets,
    image: OpenImage,
    kernel: Kernel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    client = pushing(prefetcher, sets, image, kernel)
    os.utime(image.view.layers[0].path)
    kernel.gate.set()
    settle(prefetcher)
    # Pieces of the diff alone would still be right, until the taint is seen.
    assert len(kernel.calls) < 6
    assert any("prefetch ends: " in line for line in messages(caplog))
    assert not any("prefetched" in line for line in messages(caplog))
    # And nothing of an image that is tainted already, whoever saw it.
    count = len(kernel.calls)
    client.close()
    again = Client(prefetcher, image)
    again.touch(*TOUCHED)
    settle(prefetcher)
    assert len(kernel.calls) == count
    again.close()


@pytest.mark.parametrize("number", [2, 19, 107])
def test_a_kernel_that_does_not_take_it_ends_the_push(
    number: int,
    prefetcher: Prefetcher,
    sets: WorkingSets,
    image: OpenImage,
    kernel: Kernel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    save(sets, image, TOUCHED)
    kernel.error = OSError(number, "refused")
    client = Client(prefetcher, image)
    settle(prefetcher)
    (line,) = messages(caplog)
    assert "prefetch ends: " in line and not kernel.calls
    client.close()


def test_stop_ends_all_and_nothing_begins_after_it(
    prefetcher: Prefetcher, sets: WorkingSets, image: OpenImage, kernel: Kernel
) -> None:
    client = pushing(prefetcher, sets, image, kernel)
    assert not prefetcher.stop(0.1), "it said that it had ended"
    kernel.gate.set()
    assert prefetcher.stop(20)
    assert kernel.ranges == WANTED[:1]
    client.close()
    again = Client(prefetcher, image, writing=True)
    again.touch(*TOUCHED)
    again.close()
    assert prefetcher.stop(20) and kernel.ranges == WANTED[:1]


def test_nothing_is_stored_once_a_stop_was_asked_for(
    sets: WorkingSets, image: OpenImage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even by a push that hangs in a layer's storage until after the session was closed."""
    save(sets, image, TOUCHED)
    reading, storage = threading.Event(), threading.Event()
    view = image.view

    def slow(buffer: memoryview, offset: int, supplied: dict[int, int]) -> None:
        reading.set()
        assert storage.wait(20)

    monkeypatch.setattr(view, "fill", slow)
    prefetcher = Prefetcher(sets, Notify(kernel.store))
    Client(prefetcher, image)
    assert reading.wait(20)
    assert not prefetcher.stop(0.1)
    storage.set()
    assert prefetcher.stop(20) and not kernel.calls


def test_stop_without_a_push_is_done_at_once(prefetcher: Prefetcher) -> None:
    assert prefetcher.stop(0)


def test_a_closed_image_is_let_go(
    prefetcher: Prefetcher, sets: WorkingSets, tmp_path: Path, kernel: Kernel
) -> None:
    image = shown(*write_pair(tmp_path))
    save(sets, image, TOUCHED)
    client = Client(prefetcher, image)
    settle(prefetcher)
    client.close()
    gone = weakref.ref(image)
    del image, client

    def is_gone() -> bool:
        gc.collect()
        return gone() is None

    until(is_gone, "the image is held")


# What breaks


def test_stop_ends_the_connection_of_a_push_that_hangs(
    sets: WorkingSets, image: OpenImage, kernel: Kernel
) -> None:
    aborts = []

    def abort() -> None:
        aborts.append("")
        kernel.gate.set()

    save(sets, image, TOUCHED)
    kernel.gate.clear()
    prefetcher = Prefetcher(sets, Notify(kernel.store), abort)
    client = Client(prefetcher, image)
    assert kernel.inside.wait(20)
    assert prefetcher.stop(0.1) and prefetcher.stop(0.1)
    prefetcher.close()
    assert len(aborts) == 1
    client.close()


def test_a_bug_is_logged_and_ends_that_push_alone(
    sets: WorkingSets, image: OpenImage, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        calls = 0

        def populate(self, push: Push, wanted: Sequence[Extent]) -> Any:
            self.calls += 1
            raise ZeroDivisionError

        def is_own(self, pid: int) -> bool:
            return False

    save(sets, image, TOUCHED)
    method = Broken()
    prefetcher = Prefetcher(sets, method)
    for n in (1, 2):
        client = Client(prefetcher, image)
        client.touch(*TOUCHED)
        until(lambda n=n: method.calls == n, "it was not tried")  # type: ignore[misc]
        client.close()
    assert prefetcher.stop(20)
    assert [r.levelno for r in caplog.records] == [logging.ERROR] * 2


def test_requests_cost_next_to_nothing_once_pushed(
    prefetcher: Prefetcher, sets: WorkingSets, image: OpenImage
) -> None:
    """No lock is taken for a request of a file that waits for nothing."""
    save(sets, image, TOUCHED)
    client = Client(prefetcher, image)
    settle(prefetcher)
    with prefetcher._changed:
        done = threading.Thread(target=client.touch, args=TOUCHED, daemon=True)
        done.start()
        done.join(20)
        assert not done.is_alive()
