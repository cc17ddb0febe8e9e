"""Work shared by processes: order, errors, interrupts, deaths; and closes that may hang."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffmergefs.core import workers
from diffmergefs.core.errors import LayerChangedError
from diffmergefs.core.layer import Layer
from diffmergefs.core.workers import (
    SharedProgress,
    Stopped,
    close,
    closing_in_threads,
    in_order,
    in_threads,
    started,
)
from tests.support.images import PAGE, write_layer
from tests.support.live import until
from tests.support.processes import children_of


def children() -> set[int]:
    """The children of this process that live, whichever thread started them."""
    return set(children_of(os.getpid()))


@pytest.mark.parametrize("jobs", [1, 2, 3, 7, 100])
def test_results_come_in_order_whoever_did_the_work(jobs: int) -> None:
    def work(item: int) -> tuple[int, int]:
        time.sleep(0.02 if item % 3 == 0 else 0)  # so that some are ready before earlier ones
        return item * item, os.getpid()

    before = children()
    found = list(in_order(work, range(10), jobs))
    assert [square for square, _ in found] == [n * n for n in range(10)]
    assert len({process for _, process in found}) == min(jobs, 10)
    assert ({os.getpid()} == {process for _, process in found}) is (jobs == 1)
    assert children() == before


def test_nothing_and_one_thing_take_no_process() -> None:
    assert list(in_order(lambda item: os.getpid(), [], 4)) == []
    assert list(in_order(lambda item: os.getpid(), ["x"], 4)) == [os.getpid()]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
@pytest.mark.parametrize("started", [0, 2])
def test_where_no_process_can_be_started_this_one_does_all_the_work(
    started: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, fork, calls = children(), os.fork, iter(range(10))

    def refuse() -> int:
        if next(calls) < started:
            return fork()
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fork", refuse)
    assert list(in_order(lambda item: os.getpid(), range(10), 3)) == [os.getpid()] * 10
    assert children() == before


@pytest.mark.parametrize("jobs", [1, 2, 7, 100])
def test_threads_give_results_in_order(jobs: int) -> None:
    def work(item: int) -> tuple[int, int]:
        time.sleep(0.02 if item % 3 == 0 else 0)  # so that some are ready before earlier ones
        return item * item, threading.get_ident()

    found = in_threads(work, range(10), jobs, lambda: None)
    assert [square for square, _ in found] == [n * n for n in range(10)]
    threads = {thread for _, thread in found}
    assert len(threads) <= jobs
    assert jobs > 1 or threads == {threading.get_ident()}


@pytest.mark.parametrize("jobs", [1, 4])
def test_the_first_error_of_a_thread_stops_the_others(jobs: int) -> None:
    stopped, done = threading.Event(), []

    def work(item: int) -> None:
        if item == 2:
            raise LayerChangedError("/a: changed")
        if item > 2:
            assert stopped.wait(30)
        done.append(item)

    with pytest.raises(LayerChangedError, match="/a: changed"):
        in_threads(work, range(1000), jobs, stopped.set)
    assert stopped.is_set() and len(done) < 10


def test_threads_report_to_one_progress_until_they_are_stopped() -> None:
    done: list[int] = []
    shared = SharedProgress(done.append)
    in_threads(shared.report, [1, 2, 3, 4], 3, shared.stop)
    assert sorted(done) == [1, 2, 3, 4]
    shared.stop()
    with pytest.raises(Stopped):
        shared.report(5)
    assert sum(done) == 10


@pytest.mark.parametrize("jobs", [0, -1])
def test_less_than_one_job_is_refused(jobs: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        list(in_order(str, [1], jobs))


def failing(error: Exception) -> Callable[[int], int]:
    def work(item: int) -> int:
        if item == 3:
            raise error
        return item

    return work


@pytest.mark.parametrize(
    "error", [LayerChangedError("/a: changed"), OSError(errno.EIO, "I/O error"), ValueError("bug")]
)
def test_an_error_is_raised_here_and_says_where_it_was(error: Exception) -> None:
    results = in_order(failing(error), range(6), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    before = children()
    with pytest.raises(type(error)) as caught:
        next(results)
    assert str(caught.value) == str(error)
    assert "in work" in "".join(caught.value.__notes__)
    assert children() < before


def test_a_generator_that_is_closed_ends_its_processes() -> None:
    before = children()
    results = in_order(lambda item: bytes(1 << 20), range(100), 3)  # pipes that fill up
    assert next(results) == bytes(1 << 20)
    assert len(children() - before) == 3
    results.close()
    assert children() == before


def test_a_process_that_dies_is_an_error_of_one_line() -> None:
    def work(item: int) -> int:
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    results = in_order(work, range(4), 2)
    assert next(results) == 0
    with pytest.raises(OSError, match=r"a process ended early \(-9\); try fewer jobs") as caught:
        next(results)
    assert caught.value.errno == errno.ECHILD
    gc.collect()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_a_group_gets_are_left_to_the_parent(number: signal.Signals) -> None:
    def work(item: int) -> int:
        os.kill(os.getpid(), number)
        return item

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert list(in_order(work, range(4), 2)) == [0, 1, 2, 3]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    def work(item: int) -> int:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.01)
        return item

    parent = os.fork()
    if parent == 0:
        for _ in in_order(work, range(10_000), 2):
            pass
        os._exit(0)
    try:
        deadline = time.monotonic() + 20
        while len(os.listdir(tmp_path)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    workers = [int(name) for name in os.listdir(tmp_path)]
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # whoever adopts it may take a while to wait for it


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def opened() -> int:
    return os.open("/dev/null", os.O_RDONLY)


class Hung:
    """Stands in for os.close, which does not come back for some descriptors."""

    def __init__(self) -> None:
        self.fds: set[int] = set()
        self.goes_on = threading.Event()
        self._close = os.close

    def __call__(self, fd: int) -> None:
        if fd in self.fds:
            self.goes_on.wait(60)
        self._close(fd)


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hung]:
    found = Hung()
    monkeypatch.setattr(os, "close", found)
    yield found
    found.goes_on.set()


def test_here_unless_asked_for_threads(hung: Hung) -> None:
    fd = opened()
    close(fd, 1)
    assert not is_open(fd)
    close(fd, 1)  # what close(2) says is nobody's concern


def test_one_that_hangs_holds_up_those_of_its_filesystem_alone(hung: Hung) -> None:
    stuck, behind, others = opened(), opened(), [opened() for _ in range(5)]
    hung.fds.add(stuck)
    with closing_in_threads():
        close(stuck, 1)
        close(behind, 1)
        for fd in others:
            close(fd, 2)
        until(lambda: not any(map(is_open, others)), "the others are not closed")
        assert is_open(stuck) and is_open(behind)
        hung.goes_on.set()
        until(lambda: not is_open(behind), "it is not closed once it can be")
    assert workers._Closing.queue is None


def test_a_layer_whose_last_reference_drops_waits_for_nothing(hung: Hung, tmp_path: Path) -> None:
    layer = Layer.open(str(write_layer(tmp_path / "layer", 16 * PAGE, [])))
    fd = layer.fd
    hung.fds.add(fd)
    with closing_in_threads():
        del layer
        gc.collect()
        assert is_open(fd)
        hung.goes_on.set()
        until(lambda: not is_open(fd), "it is not closed")


def test_without_threads_it_is_closed_all_the_same(
    hung: Hung, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    first, second = opened(), opened()
    with closing_in_threads():
        monkeypatch.setattr(threading.Thread, "start", start)
        assert started(print, "none") is None
        close(first, 1)
        until(lambda: not is_open(first), "it is not closed")
    with closing_in_threads():
        close(second, 1)
        assert not is_open(second)


def test_a_layer_that_cannot_be_looked_at_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> os.stat_result:
        raise OSError(errno.EIO, "on purpose")

    fd = opened()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fail)
        with pytest.raises(OSError):
            Layer("layer", fd)
    assert not is_open(fd)
