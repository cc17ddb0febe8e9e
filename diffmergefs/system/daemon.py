"""Going to the background: a child that serves, a caller that waits for it, and its open files."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, MutableMapping
from typing import NamedTuple, NoReturn

_READY = b"ready"
_FAILED = 70
_BY_PATH = re.compile(r"/(?:dev|proc/[^/]+(?:/task/[^/]+)?)/fd/(\d+)")
_FIRST = 3  # sd_listen_fds(3)
_MOST_DESCRIPTORS = 1 << 20  # the default of fs.nr_open on Linux


class Outcome(NamedTuple):
    """How the start of a child went.

    `status` is 0 once the child is ready, its exit status if it ended before, None if it was
    stopped because it took too long; `text` is what it wrote to stderr until then.
    """

    status: int | None
    text: str


def start(
    serve: Callable[[Callable[[], None]], int], timeout: float, kept: Collection[int] = ()
) -> Outcome:
    """Run `serve(ready)` in a child in a session of its own; returns when it has called `ready`.

    `serve` gives the child's exit status. The child's standard streams are /dev/null, but until it
    is ready its stderr comes back in the outcome. Of the other descriptors it has those that are
    `kept`; the rest, which whoever called us may have left open, it would hold for ever. A child
    that is not ready after `timeout` seconds, or when the wait is interrupted, is ended with
    SIGTERM, and with SIGKILL two seconds later; one that finds its caller gone when it is ready
    sends SIGTERM to itself. Call it before any thread was started.
    """
    words_read, words_write = os.pipe()
    ready_read, ready_write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(words_read)
        os.close(ready_read)
        _become_daemon(serve, words_write, ready_write, kept)
    os.close(words_write)
    os.close(ready_write)
    try:
        return _wait(child, words_read, ready_read, timeout)
    except BaseException:
        _end(child)
        raise
    finally:
        os.close(words_read)
        os.close(ready_read)


def _become_daemon(
    serve: Callable[[Callable[[], None]], int], words: int, ready_write: int, kept: Collection[int]
) -> NoReturn:
    status = _FAILED
    try:
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(words, 2)
        close_all_but({null, ready_write, *kept})

        def ready() -> None:
            sys.stderr.flush()
            os.dup2(null, 2)
            try:
                os.write(ready_write, _READY)
            except BrokenPipeError:
                # Nobody knows that it came up: it ends as if it was asked to.
                os.kill(os.getpid(), signal.SIGTERM)
            os.close(ready_write)

        status = serve(ready)
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else _FAILED
    finally:
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, words: int, ready: int, timeout: float) -> Outcome:
    deadline = time.monotonic() + timeout
    said = {words: b"", ready: b""}
    still_open = set(said)
    while still_open and said[ready] != _READY:
        left = deadline - time.monotonic()
        readable, _, _ = select.select(list(still_open), [], [], max(0.0, left))
        if not readable:
            _end(child)
            return Outcome(None, said[words].decode(errors="replace"))
        for fd in readable:
            chunk = os.read(fd, 65536)
            said[fd] += chunk
            if not chunk:
                still_open.discard(fd)
    if said[ready] == _READY:
        # Not up to its end: a helper of the mount (auto_unmount has one) may hold it open.
        os.set_blocking(words, False)
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(words, 65536):
                said[words] += chunk
        return Outcome(0, said[words].decode(errors="replace"))
    _, wait_status = os.waitpid(child, 0)
    # One that ended well before it was ready did not come up either.
    status = os.waitstatus_to_exitcode(wait_status) or _FAILED
    return Outcome(status, said[words].decode(errors="replace"))


def _end(child: int) -> None:
    # One that hangs in the kernel does not end even so; it is not waited for.
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
    """The descriptors that paths in these arguments name, as `/dev/fd/5` does."""
    return {int(n) for argument in arguments for n in _BY_PATH.findall(argument)}


def handed_over(environment: MutableMapping[str, str]) -> set[int]:
    """Those that a service manager gave this process, by sd_listen_fds(3).

    The variables are taken out of `environment`, so that no child takes itself to be meant.
    """
    count = environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    is_ours = environment.pop("LISTEN_PID", "") == str(os.getpid())
    if not is_ours or not re.fullmatch("[0-9]{1,6}", count):
        return set()
    return set(range(_FIRST, _FIRST + int(count)))
