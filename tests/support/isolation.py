"""The test session in a mount namespace of its own, its files on a disk, signals as a terminal has.

Other programs of the machine, other sessions among them, then neither see what is mounted here nor
keep it mounted (a new namespace holds a copy of every mount that it was made from, and a FUSE
daemon ends with the last copy). And what they left mounted is not seen here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile

from diffmergefs.core import sparse
from tests.support import mounttable, skips

_CLONE_NEWNS = 0x20000
_MS_REC, _MS_SLAVE = 0x4000, 0x80000
_MNT_DETACH = 2


def enter_own_mounts() -> bool:
    """Move this process into a new mount namespace, without the mounts of other sessions in it.

    Mounts of other programs that come and go later are followed, if the machine shares them; those
    made here reach nobody. False where that is not allowed: then all stays as it was. Call it
    before any thread was started: only the caller moves.
    """
    if not skips.may_mount():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        return False
    if libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None) != 0:
        raise OSError(ctypes.get_errno(), "the namespace's mounts cannot be made its own")
    for entry in reversed(mounttable.entries()):
        if _is_of_a_session(entry):
            libc.umount2(os.fsencode(entry.path), _MNT_DETACH)
    return True


def _is_of_a_session(entry: mounttable.Entry) -> bool:
    made_by_tests = os.path.join(os.path.realpath(tempfile.gettempdir()), "diffmergefs-")
    return entry.fstype == "fuse.diffmergefs" or entry.path.startswith(made_by_tests)


def keep_files_on_disk(disk: str = "/var/tmp") -> None:
    """Put temporary files into `disk` if /tmp is a tmpfs, as it is in Debian 13.

    A tmpfs drops no cached pages, and a reader that maps a diff there fills its holes. Left alone
    are a TMPDIR that the caller chose, and a `disk` that is a tmpfs too or may not be written.
    """
    if "TMPDIR" in os.environ or not _is_tmpfs(tempfile.gettempdir()):
        return
    if os.access(disk, os.W_OK | os.X_OK) and not _is_tmpfs(disk):
        os.environ["TMPDIR"] = tempfile.tempdir = disk


def _is_tmpfs(directory: str) -> bool:
    fd = os.open(directory, os.O_RDONLY)
    try:
        return sparse.filesystem_magic(fd) == sparse.TMPFS_MAGIC
    finally:
        os.close(fd)


def have_usual_signals() -> None:
    """Ignore and block none of those that tests send, whatever nohup(1) or a shell's `&` did."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
