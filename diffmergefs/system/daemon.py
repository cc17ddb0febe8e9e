"""Daemons: a child that serves, a caller that waits, inherited descriptors, the service manager."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable, MutableMapping
from typing import NamedTuple, NoReturn, Protocol

_READY = b"ready"
_FAILED = 70
_BY_PATH = re.compile(r"/(?:dev|proc/[^/]+(?:/task/[^/]+)?)/fd/(\d+)")
_FIRST = 3  # sd_listen_fds(3)
_MOST_DESCRIPTORS = 1 << 20  # the default of fs.nr_open on Linux


class Outcome(NamedTuple):
    """How the start of a child went.

    `status` is 0 if the child is ready, its exit status if it ended before that, and None if it
    was ended because it took too long. `text` is what it wrote to stderr until then.
    """

    status: int | None
    text: str


class Caller(Protocol):
    """Who waits for a daemon to become ready."""

    def ready(self) -> None:
        """Tell the caller that the daemon is ready, and `leave` it."""

    def leave(self) -> None:
        """Give back what the caller lent this process: its stderr, and the line to it."""


class _Caller:
    def __init__(self, null: int, line: int) -> None:
        self._null, self._line = null, line

    def ready(self) -> None:
        sys.stderr.flush()
        os.dup2(self._null, 2)
        try:
            os.write(self._line, _READY)
        except BrokenPipeError:
            # The caller is gone and nobody knows of this daemon, so it ends.
            os.kill(os.getpid(), signal.SIGTERM)
        self.leave()

    def leave(self) -> None:
        os.dup2(self._null, 2)
        if self._line >= 0:
            os.close(self._line)
            self._line = -1


def start(serve: Callable[[Caller], int], timeout: float, kept: Collection[int] = ()) -> Outcome:
    """Run `serve(caller)` in a child in its own session; return once it has called `ready`.

    `serve` returns the child's exit status. The child's standard streams are /dev/null, but until
    it is ready its stderr goes into the outcome. Of the other descriptors it keeps only `kept`;
    it would hold the rest, which our caller may have left open, for ever. If the child is not
    ready after `timeout` seconds, or the wait is interrupted, it gets SIGTERM, and SIGKILL two
    seconds later. If its caller is gone when it is ready, it sends SIGTERM to itself. Call this
    before any thread is started.
    """
    stderr_read, stderr_write = os.pipe()
    ready_read, ready_write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(stderr_read)
        os.close(ready_read)
        _become_daemon(serve, stderr_write, ready_write, kept)
    os.close(stderr_write)
    os.close(ready_write)
    try:
        return _wait(child, stderr_read, ready_read, timeout)
    except BaseException:
        _end(child)
        raise
    finally:
        os.close(stderr_read)
        os.close(ready_read)


def _become_daemon(
    serve: Callable[[Caller], int], stderr: int, ready_write: int, kept: Collection[int]
) -> NoReturn:
    status = _FAILED
    try:
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(stderr, 2)
        close_all_but({null, ready_write, *kept})

        status = serve(_Caller(null, ready_write))
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else _FAILED
    finally:
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, stderr: int, ready: int, timeout: float) -> Outcome:
    deadline = time.monotonic() + timeout
    received = {stderr: b"", ready: b""}
    still_open = set(received)
    while still_open and received[ready] != _READY:
        left = deadline - time.monotonic()
        readable, _, _ = select.select(list(still_open), [], [], max(0.0, left))
        if not readable:
            _end(child)
            return Outcome(None, received[stderr].decode(errors="replace"))
        for fd in readable:
            chunk = os.read(fd, 65536)
            received[fd] += chunk
            if not chunk:
                still_open.discard(fd)
    if received[ready] == _READY:
        # Do not read up to the end: a helper of the mount (auto_unmount has one) may hold it open.
        os.set_blocking(stderr, False)
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(stderr, 65536):
                received[stderr] += chunk
        return Outcome(0, received[stderr].decode(errors="replace"))
    _, wait_status = os.waitpid(child, 0)
    # A child that exits with 0 before it is ready has failed too.
    status = os.waitstatus_to_exitcode(wait_status) or _FAILED
    return Outcome(status, received[stderr].decode(errors="replace"))


def _end(child: int) -> None:
    # A child that hangs in the kernel does not end even so; nobody waits for it.
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.kill(child, number)
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                if os.waitpid(child, os.WNOHANG)[0]:
                    return
                time.sleep(0.05)


def close_all_but(kept: Iterable[int]) -> None:
    """Close every descriptor above 2 that is not among `kept`."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    end = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else max(hard, _MOST_DESCRIPTORS)
    low = 3
    for fd in sorted({fd for fd in kept if low <= fd < end}):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, end)


def named_in(arguments: Iterable[str]) -> set[int]:
    """The descriptors that paths such as `/dev/fd/5` in these arguments name."""
    return {int(n) for argument in arguments for n in _BY_PATH.findall(argument)}


def handed_over(environment: MutableMapping[str, str]) -> set[int]:
    """The descriptors that a service manager passed to this process, by sd_listen_fds(3).

    The variables are removed from `environment`, so that no child uses them.
    """
    count = environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    is_ours = environment.pop("LISTEN_PID", "") == str(os.getpid())
    if not is_ours or not re.fullmatch("[0-9]{1,6}", count):
        return set()
    return set(range(_FIRST, _FIRST + int(count)))


log = logging.getLogger(__name__)

ADDRESS = "NOTIFY_SOCKET"
JOURNAL = "JOURNAL_STREAM"


class Notifier:
    """Sends a service's state to the socket that `environment` names: a path, or `@` and a name.

    The name is removed from `environment`, so that no child uses it. Without one nothing is sent.
    Everyone may read a service's state, and root does not know
    who owns the socket that its caller named. So never send paths or tags.
    """

    def __init__(self, environment: MutableMapping[str, str] | None = None) -> None:
        address = environment.pop(ADDRESS, None) if environment else None
        if address and address[0] not in "/@":
            log.warning("%s=%s: neither a path nor an abstract name; ignored", ADDRESS, address)
            address = None
        self._address = address or None

    def __bool__(self) -> bool:
        """Whether there is an address to notify."""
        return self._address is not None

    def notify(self, *assignments: str) -> None:
        """Send assignments such as `READY=1` as one datagram.

        Never waits and never raises: what cannot be sent is dropped, with a warning in the log.
        """
        if self._address is None:
            return
        name = os.fsencode(self._address)
        name = b"\0" + name[1:] if name[:1] == b"@" else name
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.setblocking(False)
                out.sendto("\n".join(assignments).encode(), name)
        except OSError as error:
            log.warning("%s=%s: cannot be notified: %s", ADDRESS, self._address, error)


def is_journal(fd: int, stream: str | None) -> bool:
    """Whether `fd` is the connection to the journal that JOURNAL_STREAM's value `stream` names."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"
