"""Read leases: does someone have a layer open for writing, and does someone open it so later?

A lease whose breaking nobody answers makes the breaker wait for 45 seconds, and the default action
of SIGIO, by which the kernel announces a break, ends the process. So breaks are announced by
SIGNAL here, whose default action is to be ignored, and a lease that nobody watches is given back
in the moment it was taken.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Protocol

from diffmergefs.core import sparse
from diffmergefs.core.errors import FileAccessError, WriterError

log = logging.getLogger(__name__)

#: By what a process is told that one of the leases that it keeps is being broken.
SIGNAL = signal.SIGURG

# Where EAGAIN does not mean a writer: the server granted this machine no delegation.
_SHARED_FILESYSTEMS = frozenset({sparse.NFS_MAGIC, 0xFF534D42, 0xFE534D42})
_NO_LEASES = frozenset(
    {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.ENOTTY, errno.EPERM}
)
# F_UNLCK undoes F_SETSIG and F_SETOWN: what one thread has prepared another must not undo.
_guard = threading.Lock()


class Writers(enum.Enum):
    """What a lease said of a file's writers; the value is the end of a sentence about the file.

    With the last two nothing is known: the file may have writers.
    """

    NONE = "nobody has it open for writing"
    SOME = "open for writing"
    NOT_OWNER = (
        "whether it is open for writing cannot be told: it belongs to another user, and without"
        " CAP_LEASE only its owner can ask"
    )
    NO_LEASES = "whether it is open for writing cannot be told: its filesystem gives no leases"


class Held(Protocol):
    """An open file that a lease can be kept on: `fd` is -1 once it is closed."""

    path: str
    fd: int


def writers(fd: int) -> Writers:
    """Whether anyone, this process included, has the file of `fd` open for writing now.

    `fd` is open for reading only, and no lease is kept on it. A writable shared mapping counts,
    its file closed or not. A writer of the upper file of an overlay is not noticed, nor one on
    another machine. For some microseconds a lease is held: who opens the file for writing just
    then waits for that long (with O_NONBLOCK: gets EWOULDBLOCK), and this process gets SIGNAL,
    which is ignored unless it has a handler for it. Any thread may call. Raises OSError.
    """
    with _guard:
        found = _take(fd)
        if found is Writers.NONE:
            _give_back(fd)
    return found


def is_open_elsewhere(fd: int) -> bool:
    """Whether anyone, this process included, has the file of `fd` open by another descriptor.

    Asked by a write lease, of which holds what `writers` says of a read lease. False also where
    that cannot be told.
    """
    with _guard:
        found = _take(fd, fcntl.F_WRLCK)
        if found is Writers.NONE:
            _give_back(fd)
    return found is Writers.SOME


def require_no_writer(fd: int, path: str) -> None:
    """Raise WriterError if someone has the file of `fd` open for writing now (see `writers`).

    Returns where that cannot be told. `path` is for the message. Raises FileAccessError.
    """
    _require_none(_asked(writers, fd, path), path)


class Leases:
    """Read leases that are kept on layers, so that whoever opens one for writing is noticed.

    They belong to this process, not to a fork's child, and end with their layers. It must handle
    SIGNAL, and on it call `answer_breaks`, also once when it begins to handle it: whoever opens a
    layer for writing waits until then, for 45 seconds at most. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._layers: weakref.WeakSet[Held] = weakref.WeakSet()
        self._said: set[Writers] = set()

    def require_no_writer(self, layer: Held) -> None:
        """Raise WriterError if someone has the layer open for writing now; else keep a lease on it.

        One that was kept and broken since is taken again. Where no lease can be had none is kept,
        and the log says so, once for each reason. Raises FileAccessError.
        """
        with _guard:
            found = _asked(_kept, layer.fd, layer.path)
            if found is Writers.NONE:
                # In one step with the taking, or a break in between would go unanswered.
                self._layers.add(layer)
            is_news = found not in self._said
            self._said.add(found)
        _require_none(found, layer.path)
        if is_news and found is not Writers.NONE:
            log.info("%s: %s", layer.path, found.value)

    def answer_breaks(self) -> None:
        """Give back each lease that is being broken, with a line in the log; never blocks.

        All leases are looked at: signals coalesce.
        """
        with _guard:
            broken = [layer for layer in self._layers if not _is_kept(layer.fd)]
            for layer in broken:
                self._layers.discard(layer)
                if layer.fd >= 0:
                    _give_back(layer.fd)
        for layer in broken:
            if layer.fd >= 0:
                log.info(
                    "%s: opened for writing by someone; its views fail if it is written to",
                    layer.path,
                )


def require_no_writers(
    layers: Iterable[Held], *, allowed: bool, leases: Leases | None = None
) -> list[str]:
    """Raise WriterError for the first of the layers that someone has open for writing now.

    Where writers are `allowed` there is a line in the answer for each such layer instead, for the
    user to see. With `leases` a lease is kept on each of the others. Raises FileAccessError.
    """
    overridden = []
    for layer in layers:
        try:
            if leases is not None:
                leases.require_no_writer(layer)
            else:
                require_no_writer(layer.fd, layer.path)
        except WriterError as error:
            if not allowed:
                raise
            overridden.append(f"--allow-writers overrides: {error}")
    return overridden


def _asked(ask: Callable[[int], Writers], fd: int, path: str) -> Writers:
    try:
        return ask(fd)
    except OSError as error:
        raise FileAccessError(f"{path}: cannot ask for a lease: {error.strerror}") from error


def _require_none(found: Writers, path: str) -> None:
    if found is Writers.SOME:
        raise WriterError(
            f"{path}: {found.value}, perhaps by its VMM; try again once it is closed, or vouch with"
            " --allow-writers that nobody writes to it (wrong bytes or none if it is not so)"
        )


def _kept(fd: int) -> Writers:
    return Writers.NONE if _is_kept(fd) else _take(fd)


def _is_kept(fd: int) -> bool:
    # One that is being broken reads as F_UNLCK already.
    return fd >= 0 and fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK


def _take(fd: int, kind: int = fcntl.F_RDLCK) -> Writers:
    fcntl.fcntl(fd, fcntl.F_SETSIG, SIGNAL)
    # Otherwise it would be this thread that is told, and nobody once it has ended.
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
    except OSError as error:
        if error.errno == errno.EACCES:
            return Writers.NOT_OWNER
        if error.errno in _NO_LEASES:
            return Writers.NO_LEASES
        if error.errno == errno.EAGAIN:
            shared = sparse.filesystem_magic(fd) in _SHARED_FILESYSTEMS
            return Writers.NO_LEASES if shared else Writers.SOME
        raise
    return Writers.NONE


def _give_back(fd: int) -> None:
    # The kernel takes it away by itself from one who let the breaker wait for too long.
    with contextlib.suppress(BlockingIOError):
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
