"""A read that finds nothing, because its request was taken back, ends all the same."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from collections.abc import Iterator

import pytest
import trio

from diffmergefs.fuse.readalarm import ReadAlarm
from diffmergefs.fuse.readloop import RequestWait
from tests.support.live import until

OFF = (0.0, 0.0)
_read = ctypes.CDLL(None, use_errno=True).read


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def read_as_pyfuse3(pipe: tuple[int, int]) -> int:
    """The errno of a read(2), which Python's own would take up again; 0 if there was something.

    One that would sleep for ever finds something after a while.
    """
    late = threading.Timer(20, os.write, (pipe[1], b"late"))
    late.start()
    try:
        count = _read(pipe[0], ctypes.create_string_buffer(1), 1)
        return ctypes.get_errno() if count < 0 else 0
    finally:
        late.cancel()
        late.join()


@pytest.mark.parametrize("needs_trio", [True, False])
def test_a_request_that_is_taken_back_does_not_keep_the_reader(
    pipe: tuple[int, int], needs_trio: bool
) -> None:
    async def main() -> None:
        with ReadAlarm() as alarm:
            wait = RequestWait(alarm)
            for _ in range(1 if needs_trio else 2):
                os.write(pipe[1], b"x")
                await wait(pipe[0])
                os.read(pipe[0], 1)
            for _ in range(3):  # not the first alarm only
                assert read_as_pyfuse3(pipe) == errno.EINTR

    trio.run(main)


def test_nothing_rings_once_nothing_is_read(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        with ReadAlarm() as alarm:
            wait = RequestWait(alarm)
            assert signal.getitimer(signal.ITIMER_REAL) == OFF
            for _ in range(2):
                os.write(pipe[1], b"x")
                await wait(pipe[0])
                assert signal.getitimer(signal.ITIMER_REAL) != OFF
                os.read(pipe[0], 1)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait, pipe[0])  # as an idle mount waits
                    while signal.getitimer(signal.ITIMER_REAL) != OFF:
                        await trio.sleep(0.01)
                    nursery.cancel_scope.cancel()

    trio.run(main)


def test_it_rings_on_while_a_read_is_tried_and_no_longer() -> None:
    rings = 0

    class Counting(ReadAlarm):
        def _ring(self, number: int, frame: object) -> None:
            nonlocal rings
            rings += 1
            super()._ring(number, frame)

    with Counting(0.001) as alarm:
        alarm.expect()
        until(lambda: rings > 20, "it does not ring")
        alarm.is_expected = False
        until(lambda: signal.getitimer(signal.ITIMER_REAL) == OFF, "it rings on")


def test_handler_and_timer_are_put_back() -> None:
    def other(number: int, frame: object) -> None: ...

    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    signal.signal(signal.SIGALRM, other)
    signal.setitimer(signal.ITIMER_REAL, 1000, 2000)
    try:
        with ReadAlarm() as alarm:
            alarm.expect()
        assert signal.getsignal(signal.SIGALRM) is other
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert interval == 2000 and 900 < left <= 1000
        # Outside it sets nothing.
        alarm.expect()
        ReadAlarm().expect()
        assert signal.getitimer(signal.ITIMER_REAL)[1] == 2000
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)
