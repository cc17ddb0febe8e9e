"""Work in several processes or threads, its progress, and closing files in background threads."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}

T = TypeVar("T")
R = TypeVar("R")

#: Called again and again while work goes on, each time with the bytes done since the last call.
Progress = Callable[[int], None]


def ignore_progress(count: int) -> None:
    """The `Progress` of a caller that does not need to know."""


def in_order(work: Callable[[T], R], items: Sequence[T], jobs: int = 1) -> Generator[R, None, None]:
    """`work(item)` for each of the items, in their order, by up to `jobs` processes.

    With one job, or one item, this process does the work, and also where no process can be started
    (pids.max, no memory). Otherwise forks of it do: they share its open files and have a copy of
    its memory; results must be picklable. An exception of `work` is
    raised here, with the traceback of its process as a note. Close or exhaust the generator: that
    ends the processes, as the end of this one does; SIGINT, SIGTERM and SIGHUP do not. Raises
    ValueError for less than one job, and OSError (ECHILD) if someone else ended a process.
    """
    if jobs < 1:
        raise ValueError(f"{jobs} jobs, at least one is needed")
    jobs = min(jobs, len(items))
    if jobs > 1:
        try:
            yield from _by_processes(work, items, jobs)
            return
        except _NoProcess:
            pass
    yield from map(work, items)


class _NoProcess(Exception):
    pass


def _by_processes(
    work: Callable[[T], R], items: Sequence[T], jobs: int
) -> Generator[R, None, None]:
    # Imported only if there are processes to start: it takes 20 ms.
    import multiprocessing

    context = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    readers: list[Connection] = []
    try:
        with _ending_signals_held():
            for number in range(jobs):
                reader, writer = context.Pipe(duplex=False)
                readers.append(reader)
                # Each process does every n-th item, so that its pipe holds the results in the
                # order in which they are read; a full pipe makes the process wait.
                share = (work, items[number::jobs], writer, readers)
                processes.append(context.Process(target=_serve, args=share, daemon=True))
                try:
                    processes[-1].start()
                except OSError as error:
                    if error.errno in (errno.EAGAIN, errno.ENOMEM):
                        raise _NoProcess from error
                    raise
                finally:
                    writer.close()
        for number in range(len(items)):
            yield _received(readers[number % jobs], processes[number % jobs])
    finally:
        started = [process for process in processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()
        for reader in readers:
            reader.close()


class Stopped(Exception):
    """Ends the work of a thread after `SharedProgress.stop`."""


class SharedProgress:
    """Reports the progress of several threads to one `Progress`, one at a time, and stops them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stopped = False
        self._lock = threading.Lock()

    def report(self, count: int) -> None:
        """Report the amount done. Raises Stopped once `stop` was called."""
        with self._lock:
            if self._stopped:
                raise Stopped
            self._progress(count)

    def stop(self) -> None:
        """Let each thread end with its next report."""
        with self._lock:
            self._stopped = True


def in_threads(
    work: Callable[[T], R], items: Sequence[T], jobs: int, stop: Callable[[], None]
) -> list[R]:
    """`work(item)` for each of the items, in their order, by up to `jobs` threads.

    The calling thread is one of them, so the work is also done where no thread can be started. The
    first exception, an interrupt included, ends it: `stop` is called, which may make the work that
    is under way raise, and no other item begins. The exception is raised once all threads are done.
    """
    results: dict[int, R] = {}
    errors: list[BaseException] = []
    left = enumerate(items)
    lock = threading.Lock()

    def work_off() -> None:
        while not errors:
            with lock:
                number, item = next(left, (-1, None))
            if number < 0:
                return
            try:
                results[number] = work(cast(T, item))
            except BaseException as error:
                errors.append(error)
                stop()

    helpers = [started(work_off, f"worker-{n}") for n in range(1, min(jobs, len(items)))]
    try:
        work_off()
        _join(helpers)
    except BaseException as error:
        errors.append(error)
        stop()
    finally:
        _join(helpers)
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(items))]


def _join(threads: Sequence[threading.Thread | None]) -> None:
    for thread in threads:
        if thread is not None:
            thread.join()


@contextmanager
def _ending_signals_held() -> Iterator[None]:
    # Terminals and service managers signal all processes of a group. This process handles the
    # signal and ends the others. They keep such signals blocked, as at the fork, for all their
    # life: if they ended first, that would look like a failure.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    work: Callable[[Any], Any], items: Sequence[Any], writer: Connection, readers: list[Connection]
) -> None:
    for reader in readers:
        reader.close()  # otherwise the writers would not notice the end of the parent
    try:
        for item in items:
            writer.send((work(item), None))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone
    except Exception as error:
        error.add_note(traceback.format_exc())
        writer.send((None, error))


def _received(reader: Connection, process: BaseProcess) -> Any:
    try:
        result, error = reader.recv()
    except EOFError:
        process.join()
        raise OSError(
            errno.ECHILD, f"a process ended early ({process.exitcode}); try fewer jobs", "jobs"
        ) from None
    if error is not None:
        raise error
    return result


def started(work: Callable[[], object], name: str) -> threading.Thread | None:
    """A new thread that runs `work`, or None if no thread can be started (pids.max, no memory).

    The process does not wait for it at its end. Only for work that everything else can do without.
    """
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def close(fd: int, device: int) -> None:
    """Close a file of the filesystem `device` (st_dev), in a thread inside `closing_in_threads`.

    close(2) waits for the server of a network or FUSE filesystem, which may hang. Raises nothing:
    the descriptor is closed even if close(2) reports an error. A finalizer may call this, at any
    point of any code.
    """
    if (queue := _Closing.queue) is not None:
        queue.put((fd, device))
    else:
        _close(fd)


@contextmanager
def closing_in_threads() -> Iterator[None]:
    """Inside, `close` never waits: each filesystem has a thread that closes its files.

    The end of the process closes what is still open then. Contexts must not overlap.
    """
    closing = _Closing()
    if started(closing.deal, "closing") is None:
        yield
        return
    # Of all queues, only SimpleQueue allows a put in a finalizer that interrupts another put.
    _Closing.queue = closing.given
    try:
        yield
    finally:
        _Closing.queue = None
        closing.given.put(None)


class _Closing:
    queue: SimpleQueue[tuple[int, int] | None] | None = None

    def __init__(self) -> None:
        self.given: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        self._lanes: dict[int, SimpleQueue[int | None]] = {}

    def deal(self) -> None:
        while (item := self.given.get()) is not None:
            fd, device = item
            lane = self._lanes.get(device) or self._new_lane(device)
            if lane is None:
                _close(fd)  # no thread can be started, so the other filesystems wait
            else:
                lane.put(fd)
        for lane in self._lanes.values():
            lane.put(None)

    def _new_lane(self, device: int) -> SimpleQueue[int | None] | None:
        lane: SimpleQueue[int | None] = SimpleQueue()

        def close_all() -> None:
            while (fd := lane.get()) is not None:
                _close(fd)

        if started(close_all, f"closing-{device}") is None:
            return None
        self._lanes[device] = lane
        return lane


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)
