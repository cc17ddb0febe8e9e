"""Read leases: does a process have a layer open for writing?"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import logging
import os
import signal
import threading
from collections.abc import Iterable

from diffmergefs.core import sparse
from diffmergefs.core.beneath import closing_fd
from diffmergefs.core.errors import FileAccessError, WriterError
from diffmergefs.core.layer import Layer

log = logging.getLogger(__name__)

# Announces that a lease is being broken. The default, SIGIO, would end this process.
_SIGNAL = signal.SIGURG
# Where EAGAIN does not mean a writer: the server granted this machine no delegation.
_SHARED_FILESYSTEMS = frozenset({sparse.NFS_MAGIC, 0xFF534D42, 0xFE534D42})
_NO_LEASES = frozenset(
    {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.ENOTTY, errno.EPERM}
)
# Giving a lease back undoes F_SETSIG, which another thread may have just set on the same file.
_lock = threading.Lock()


class Writers(enum.Enum):
    """What a lease says about the writers of a file. The value completes "FILE: ".

    The last two mean that nothing is known: the file may have writers.
    """

    NONE = "nobody has it open for writing"
    SOME = "open for writing"
    NOT_OWNER = (
        "cannot tell whether it is open for writing: it belongs to another user, and only its owner"
        " or a process with CAP_LEASE can ask"
    )
    NO_LEASES = "cannot tell whether it is open for writing: its filesystem gives no leases"


_reported: set[Writers] = set()  # what `require_no_writers` has logged


def writers(fd: int) -> Writers:
    """Whether any process, this one included, has the file of `fd` open for writing now.

    `fd` must be open for reading only. The file is opened once more for the lease: one on `fd`
    itself would outlive this process if another one shares `fd`, and hold up writers. A writable
    shared mapping counts, even after its file is closed. The answer misses writers of the upper
    file of an overlay and writers on other machines. A lease is held for some microseconds. A
    process that opens the file for writing in that moment waits (with O_NONBLOCK it gets
    EWOULDBLOCK), and this process gets SIGURG, which is ignored by default. Any thread may call.
    Raises OSError.
    """
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with closing_fd(own):
        return _ask(own, fcntl.F_RDLCK)


def is_open_elsewhere(fd: int) -> bool:
    """Whether any process, this one included, has the file of `fd` open by another descriptor.

    It asks with a write lease; the limits of `writers` apply. False also if it cannot be told.
    """
    return _ask(fd, fcntl.F_WRLCK) is Writers.SOME


def require_no_writers(layers: Iterable[Layer], *, allowed: bool) -> list[str]:
    """Raise WriterError for the first of the layers that a process has open for writing now.

    If writers are `allowed`, return a line about each such layer instead. A layer about which
    nothing is known is accepted; the log says so once for each reason. Raises FileAccessError.
    """
    overridden = []
    for layer in layers:
        try:
            found = writers(layer.fd)
        except OSError as error:
            raise FileAccessError(
                f"{layer.path}: cannot ask for a lease: {error.strerror}"
            ) from error
        if found is Writers.SOME:
            refusal = WriterError(
                f"{layer.path}: {found.value}, perhaps by its VMM; try again when it is closed, or"
                " use --allow-writers if you know that nobody writes to it (otherwise guests may"
                " read wrong bytes or get errors)"
            )
            if not allowed:
                raise refusal
            overridden.append(f"--allow-writers overrides: {refusal}")
        elif found is not Writers.NONE and found not in _reported:
            _reported.add(found)
            log.info("%s: %s", layer.path, found.value)
    return overridden


def _ask(fd: int, kind: int) -> Writers:
    with _lock:
        fcntl.fcntl(fd, fcntl.F_SETSIG, _SIGNAL)
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
        # The kernel has already taken the lease from a process that was stopped for too long.
        with contextlib.suppress(BlockingIOError):
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return Writers.NONE
