"""Keepers in processes of their own, with what they and their servers say."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffmergefs.system.board import Board, Mark
from diffmergefs.system.keeper import Keeper
from diffmergefs.system.line import Line
from tests.support.forks import fork

_DEADLINE_SECONDS = 60

#: Says something that can be JSON, in one step.
Say = Callable[[object], None]
#: A server.
Serve = Callable[[Line, Say], bytes]


class Kept:
    """A running keeper, and what it and its servers said."""

    def __init__(self, process: int, said: int) -> None:
        self.process = process
        self._said = said
        self._text = b""

    def hear(self) -> Any:
        """What was said next; None once all of the processes have ended."""
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while b"\n" not in self._text:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self._said], [], [], left)[0], "nothing is said"
            if not (more := os.read(self._said, 1 << 16)):
                assert not self._text
                return None
            self._text += more
        line, _, self._text = self._text.partition(b"\n")
        return json.loads(line)

    def rest(self) -> list[Any]:
        """All that is said from now on, until all of the processes have ended."""
        return list(iter(self.hear, None))


@contextmanager
def keeping(serve: Serve, **fields: Any) -> Iterator[Kept]:
    """A keeper of such servers, which says what it is called for.

    At last it says `over`, what `run` gave, the number of servers and how the last one ended; and
    then how many descriptors it holds by each number. Its processes end with the context.
    """
    said, saying = os.pipe()
    process = fork()
    if process == 0:
        status = 1
        try:
            os.setsid()
            os.close(said)
            _keep(serve, lambda what: _say(saying, what), fields)
            status = 0
        finally:
            os._exit(status)
    os.close(saying)
    try:
        yield Kept(process, said)
    finally:
        os.close(said)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _say(fd: int, what: object) -> None:
    os.write(fd, json.dumps(what).encode() + b"\n")


def _keep(serve: Serve, say: Say, fields: dict[str, Any]) -> None:
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda n, _: received.append(n))
    keeper = Keeper(
        serve=lambda line: serve(line, say),
        ready=lambda: say("ready"),
        tell=lambda text: say(f"tell {text}"),
        end=lambda: say("end"),
        signals=received,
        **fields,
    )
    word = keeper.run()
    say(["over", None if word is None else word.decode(), keeper.started, keeper.reason])
    say([len(fds) for fds in keeper.held.values()])


def outcome(serve: Serve, **fields: Any) -> list[Any]:
    """What is said from the start of such a keeper to its end, but for `ready`."""
    with keeping(serve, **fields) as kept:
        return [each for each in kept.rest()[:-1] if each != "ready"]


def die(number: int = signal.SIGKILL) -> None:
    """End this process by a signal."""
    os.kill(os.getpid(), number)
    while True:
        signal.pause()


def signal_of(line: Line) -> int | None:
    """The next signal that the keeper passes on, as soon as it comes."""
    while True:
        try:
            return line.received()
        except BlockingIOError:
            time.sleep(0.001)


def put_marks(board: Board, *marks: Mark) -> None:
    """Have the board show these requests as in hand."""
    for place, mark in enumerate(marks):
        for n in (1, 2, 3, 0):
            board.marks[4 * place + n] = mark[n]
