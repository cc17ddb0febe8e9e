"""A process that does not serve, and the servers that it starts one after another.

The keeper holds what a successor needs: descriptors, and memory that it shares with its servers. It
has one thread, so that a fork of it is a whole process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

from diffmergefs.core.beneath import closing_fd
from diffmergefs.system import line as messages
from diffmergefs.system.board import Board, Mark
from diffmergefs.system.line import MARK, NUMBER, Line, received
from diffmergefs.system.process import end_of, is_dead, oom_kills, prefer_for_oom, text_of_end

log = logging.getLogger(__name__)

_FAILED = 70
# How often to look whether a server's leader has ended. Nothing else shows that while a thread of
# it hangs in the kernel (PIDFD_THREAD does not since Linux 6.15).
_POLL_SECONDS = 0.25
_START_SECONDS = 5.0  # how long to try to start a server
_DUMP_SECONDS = 1.0
_MOST_DUMPED = 1 << 18
#: So many deaths in a row before a server answers, or of their own within a short time, end the
#: mount. Before the first server has answered it takes fewer.
MOST_DEATHS_UNREADY, MOST_AT_START = 20, 2
MOST_DEATHS, WITHIN_SECONDS = 60, 5.0
#: What was in hand at so many deaths, and was never answered in between, is refused for so long.
POISON_DEATHS, POISON_SECONDS = 3, 60.0
_MOST_SUSPECTS = 10_000


@dataclass(kw_only=True)
class Keeper:
    """Keeps a server alive: it starts the next one when one dies.

    `serve` is called in each server, and returns the last word that `run` returns: it says that the
    mount has ended. `ready` is called when the first server is ready, `tell` with what servers want
    the service manager to know, `end` if the keeper gives up or may not start another server
    (`covers` is False): it must end the connection to the kernel. A server that says nothing for
    `watchdog` seconds is replaced too; 0 switches that off.
    """

    serve: Callable[[Line], bytes]
    ready: Callable[[], None]
    tell: Callable[[str], None]
    end: Callable[[], None]
    signals: list[int]
    covers: bool = True
    watchdog: float = 0
    board: Board = field(default_factory=Board)
    held: dict[int, list[int]] = field(default_factory=dict)
    suspects: dict[Mark, int] = field(default_factory=dict)
    poisoned: dict[Mark, float] = field(default_factory=dict)
    started: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        self._word: bytes | None = None
        self._deaths: list[float] = []
        self._unready = 0
        self._died_ns = 0
        self._was_ready = False
        self._is_stuck = False
        self._oom_kills = ""
        self._dump = os.memfd_create("dump")  # for the tracebacks of a server that crashes
        self._unreaped: list[int] = []

    def run(self) -> bytes | None:
        """Serve until the mount has ended; the last server's word, or None if the keeper gave up.

        Call it in a process with one thread. `reason` then says why.
        """
        gc.collect()
        gc.freeze()  # so that no collection writes to pages that servers share
        with _woken_by_signals() as wake:
            while True:
                try:
                    line, server, passed = self._started()
                except OSError as error:
                    self.reason = f"no other can be started: {error.strerror}"
                    break
                try:
                    self._watch(line, server, wake, passed)
                finally:
                    line.close()
                if self._word is not None:
                    return self._word
                if not self._may_go_on():
                    break
            self.end()
            return None

    # Servers

    def _started(self) -> tuple[socket.socket, int, int]:
        # Memory may be short just when a server has died of that, so it is tried again.
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                return self._start()
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(_START_SECONDS / 100)

    def _start(self) -> tuple[socket.socket, int, int]:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.board.clear()
        self.board["is_ready"] = 0
        self.board["beat"] = time.monotonic_ns()
        self.started += 1
        self._is_stuck = False
        self._oom_kills = oom_kills()
        line = self._line(its)
        try:
            server = os.fork()
        except OSError:
            mine.close()
            its.close()
            self.started -= 1
            raise
        if server == 0:
            mine.close()
            self._become_server(line)
        its.close()
        passed = len(line.signals)
        return mine, server, passed

    def _line(self, end: socket.socket) -> Line:
        return Line(
            number=self.started,
            signals=tuple(self.signals),
            held=dict(self.held),
            suspects=frozenset(self.suspects),
            poisoned=dict(self.poisoned),
            reason=self.reason,
            dump=self._dumped(),
            board=self.board,
            end=end,
        )

    def _dumped(self) -> str:
        text = os.pread(self._dump, _MOST_DUMPED, 0).decode(errors="replace").rstrip()
        os.ftruncate(self._dump, 0)
        os.lseek(self._dump, 0, os.SEEK_SET)
        return text

    def _become_server(self, line: Line) -> NoReturn:
        status = _FAILED
        try:
            signal.set_wakeup_fd(-1)
            prefer_for_oom()
            faulthandler.enable(self._dump)
            if line.is_held:  # otherwise the keeper has died since the fork
                line.last_word(self.serve(line))
                status = 0
        except Exception:
            log.exception("the server failed: this is a bug")
        finally:
            logging.shutdown()
            os._exit(status)

    def _watch(self, line: socket.socket, server: int, wake: int, passed: int) -> None:
        # Returns once the server's leader has ended. Its threads may hang in the kernel for long.
        silence = _Silence(self.board, self.watchdog)
        with _watched(line.fileno(), wake, server) as poll:
            while True:
                while passed < len(self.signals):
                    _send_signal(line, self.signals[passed])
                    passed += 1
                ready = dict(poll.poll(_POLL_SECONDS * 1000))
                if wake in ready:
                    os.read(wake, 4096)
                self._unreaped = [each for each in self._unreaped if end_of(each, 1) is None]
                if line.fileno() in ready and not self._take(line):
                    poll.unregister(line.fileno())  # the server ends
                if is_dead(server):
                    self._drain(line)
                    self._note_death(server)
                    return
                if silence.is_too_long():
                    self._replace(server)

    def _replace(self, server: int) -> None:
        self._is_stuck = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGABRT)
            end = time.monotonic() + _DUMP_SECONDS
            while time.monotonic() < end and not is_dead(server):
                time.sleep(0.01)
            os.kill(server, signal.SIGKILL)

    def _note_death(self, server: int) -> None:
        now = time.monotonic()
        self._died_ns = time.monotonic_ns()
        status = end_of(server)
        was_killed = status in (None, -signal.SIGKILL)
        if status is None:
            self._unreaped.append(server)
        self.reason = "it did nothing for too long" if self._is_stuck else text_of_end(status)
        self._unready = 0 if self.board["is_ready"] else self._unready + 1
        self.poisoned = {mark: end for mark, end in self.poisoned.items() if end > now}
        # A kill from outside says nothing about the requests in hand.
        own = self._is_stuck or not was_killed or oom_kills() != self._oom_kills
        if own:
            self._deaths = [*(d for d in self._deaths if now - d < WITHIN_SECONDS), now]
        for mark in self.board.in_hand() if own else ():
            deaths = self.suspects.pop(mark, 0) + 1
            if deaths < POISON_DEATHS:
                self.suspects[mark] = deaths
            else:
                self.poisoned[mark] = now + POISON_SECONDS
        for mark in list(self.suspects)[:-_MOST_SUSPECTS]:
            del self.suspects[mark]

    def _may_go_on(self) -> bool:
        return (
            self.covers
            and self._unready < (MOST_DEATHS_UNREADY if self._was_ready else MOST_AT_START)
            and len(self._deaths) < MOST_DEATHS
            and len(self.signals) < 2
        )

    # Messages

    def _drain(self, line: socket.socket) -> None:
        while self._take(line):
            pass

    def _take(self, line: socket.socket) -> bool:
        # One message. False if there is none, or if there can be no more.
        try:
            message, fds = received(line)
        except OSError:
            return False
        if not message:
            return False
        kind, rest = message[0], message[1:]
        if kind == messages.HOLD:
            self.held[NUMBER.unpack(rest)[0]] = fds  # fewer than were sent, at the limit of files
        elif kind == messages.DROP:
            for fd in self.held.pop(NUMBER.unpack(rest)[0], []):
                os.close(fd)
        elif kind == messages.READY:
            self._note_ready()
        elif kind == messages.TELL:
            self.tell(rest.decode())
        elif kind == messages.CLEAR:
            self.suspects.pop(MARK.unpack(rest), None)
        elif kind == messages.END:
            self._word = rest
        return True

    def _note_ready(self) -> None:
        self.board["is_ready"] = 1
        if not self._was_ready:
            self._was_ready = True
            self.ready()
        elif self._died_ns:
            stall = time.monotonic_ns() - self._died_ns
            self.board["longest_ns"] = max(self.board["longest_ns"], stall)


@contextmanager
def _watched(line: int, wake: int, server: int) -> Iterator[select.poll]:
    poll = select.poll()
    poll.register(line, select.POLLIN)
    poll.register(wake, select.POLLIN)
    try:
        pidfd = os.pidfd_open(server)
    except OSError:  # no descriptor is free: the keeper looks now and then
        yield poll
        return
    with closing_fd(pidfd):
        poll.register(pidfd, select.POLLIN)
        yield poll


class _Silence:
    # How long a server's event loop has done nothing, as far as this process itself ran meanwhile:
    # one in a frozen group or a suspended machine cannot tell.

    def __init__(self, board: Board, most: float) -> None:
        self._board, self._most = board, most
        self._beat, self._seconds, self._asked = board["beat"], 0.0, time.monotonic()

    def is_too_long(self) -> bool:
        """Whether it is too long; then it begins anew."""
        now = time.monotonic()
        self._seconds += min(now - self._asked, 4 * _POLL_SECONDS)
        self._asked = now
        if self._board["beat"] != self._beat:
            self._beat, self._seconds = self._board["beat"], 0.0
        if not self._most or self._seconds < self._most:
            return False
        self._seconds = 0.0
        return True


def _send_signal(line: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):
        line.send(bytes([messages.SIGNAL, number]), socket.MSG_DONTWAIT)


@contextmanager
def _woken_by_signals() -> Iterator[int]:
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
