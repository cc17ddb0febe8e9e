"""A new directory that stands under its name only when it is whole (law 8)."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
from contextlib import ExitStack

from diffmergefs.core.errors import OutputRefusedError
from diffmergefs.core.failures import failures

log = logging.getLogger(__name__)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Directories of snapshots leave such names out.
_TEMPORARY = re.compile(r"\.diffmergefs-[0-9a-f]{16}\.new")


class OutputDirectory:
    """A context manager for a directory that is being filled: `path` is where to fill it.

    `final` is the absolute path that it gets by `publish`. Until then it has a temporary name
    beside that and mode 0700; leaving the context before removes it with all that is in it.
    Entering removes what a killed process left there under such a name: directories of this user
    that nobody holds (a writer keeps a flock). Raises OutputRefusedError if anything stands under
    the output's name, and FileAccessError where its parent directory cannot be written.
    """

    path: str

    def __init__(self, output: str) -> None:
        self.output = output
        # A name with a slash at its end is one without; an empty one names nothing.
        self.final = os.path.abspath(output) if output else ""
        self._parent, self._name = os.path.split(self.final)
        self._held = ExitStack()

    def __enter__(self) -> OutputDirectory:
        try:
            with failures(self.output):
                self._require_free()
                self._parent_fd = self._hold(os.open(self._parent, _DIRECTORY & ~os.O_NOFOLLOW))
                self._remove_leftovers()
                self._make()
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._abandon()

    def publish(self, mode: int) -> None:
        """Give the directory its mode and, in one step, its name; both are synced.

        What was written in it must be synced by then. Raises like the context manager.
        """
        with failures(self.output):
            os.chmod(self.path, mode)
            sync_directory(self.path)
            self._require_free()
            os.rename(self.path, os.path.join(self._parent, self._name))
            self.path = ""
            os.fsync(self._parent_fd)

    def _require_free(self) -> None:
        if not self._name:
            raise OutputRefusedError(f"{self.output!r}: names no new directory")
        if os.path.lexists(os.path.join(self._parent, self._name)):
            raise OutputRefusedError(f"{self.output}: exists; choose another output")

    def _hold(self, fd: int) -> int:
        self._held.callback(os.close, fd)
        return fd

    def _make(self) -> None:
        # Noted before it exists, so that an interrupt right after leaves no litter.
        self.path = os.path.join(self._parent, f".diffmergefs-{secrets.token_hex(8)}.new")
        os.mkdir(self.path, 0o700)
        _lock(self._hold(os.open(self.path, _DIRECTORY)))

    def _remove_leftovers(self) -> None:
        for name in filter(_TEMPORARY.fullmatch, os.listdir(self._parent_fd)):
            path = os.path.join(self._parent, name)
            try:
                if self._is_leftover(name):
                    shutil.rmtree(name, dir_fd=self._parent_fd)
                    log.info("%s: left by a killed process, removed", path)
            except OSError as error:
                log.info("%s: a temporary directory, not removed: %s", path, error.strerror)

    def _is_leftover(self, name: str) -> bool:
        status = os.stat(name, dir_fd=self._parent_fd, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        fd = os.open(name, _DIRECTORY, dir_fd=self._parent_fd)
        try:
            return _lock(fd)
        finally:
            os.close(fd)

    def _abandon(self) -> None:
        with self._held:
            path = getattr(self, "path", "")
            if not path or not os.path.lexists(path):
                return
            try:
                shutil.rmtree(path)
            except OSError as error:
                log.warning("%s: left behind: %s", path, error.strerror)


def sync_directory(path: str) -> None:
    """fsync the directory `path`, so that the names in it last. Raises OSError."""
    fd = os.open(path, _DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    # False where another process has it. Where there are no locks nothing is a leftover.
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
