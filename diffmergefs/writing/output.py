"""A new file that stands under its name only when it is whole (law 8)."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from diffmergefs.core.errors import NoSpaceError, OutputRefusedError
from diffmergefs.core.failures import NO_SPACE, Target, failures, free_bytes

log = logging.getLogger(__name__)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_UNNAMED = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
_NAMED = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC
# Kernels and filesystems without O_TMPFILE; the directory itself is open by then.
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})
_TEMPORARY = re.compile(r"\.diffmergefs-[0-9a-f]{16}\.tmp")
# O_NONBLOCK: whatever has such a name must not be waited for.
_LEFTOVER = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class OutputFile:
    """A context manager for a file that is being written; `target` is where to write.

    It has no name (O_TMPFILE) or, where the filesystem cannot do that, a temporary one in the
    output's directory, and mode 0600 until `finish`. Leaving the context before `publish` removes
    it, whatever the exception. Entering removes what a killed process left in that directory under
    a temporary name: regular files of this user that are no input and that nobody holds (a writer
    keeps a flock until its end; where there are no locks, nothing is removed). Raises
    OutputRefusedError for an output that exists without `force`, that is one of `inputs`, or that
    is no regular file, even with `force` (a symlink is not followed); NoSpaceError where there
    is no room for a new file; FileAccessError where the directory cannot be written.
    """

    target: Target

    def __init__(
        self, path: str, inputs: Collection[os.stat_result], *, force: bool = False
    ) -> None:
        self.path = path
        self._directory, self._name = os.path.split(path)
        self._inputs = {(s.st_dev, s.st_ino) for s in inputs}
        self._force = force
        self._temporary: str | None = None
        self._held = ExitStack()

    def __enter__(self) -> OutputFile:
        try:
            with failures(self.path):
                self._dirfd = self._hold(os.open(self._directory or ".", _DIRECTORY))
                self._refuse_unfit()
                self._remove_leftovers()
                with self._room_needed():
                    self.target = Target(self._create(), self.path)
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._abandon()

    def finish(self, mode: int) -> None:
        """Give the file its mode and fsync it. Raises FileAccessError, NoSpaceError."""
        with failures(self.path, self.target):
            os.fchmod(self.target.fd, mode)
            os.fsync(self.target.fd)

    def publish(self) -> None:
        """Put the file, whole and synced, under its name in one step, and fsync the directory.

        Without `force` a file that has come to stand there meanwhile is refused; with it, it is
        replaced, and who has the old one open keeps it. Raises like the context manager; if only
        the directory's fsync fails, the whole file is in place.
        """
        with failures(self.path, self.target):
            if self._force:
                self._replace()
            else:
                self._link_new()
            os.fsync(self._dirfd)

    def _hold(self, fd: int) -> int:
        self._held.callback(os.close, fd)
        return fd

    @contextmanager
    def _room_needed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise NoSpaceError(
                f"{self.path}: {error.strerror} for a new file, {free_bytes(self._dirfd)} bytes are"
                " free on its filesystem; make room or choose another output"
            ) from error

    def _create(self) -> int:
        try:
            fd = self._hold(os.open(".", _UNNAMED, 0o600, dir_fd=self._dirfd))
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            return self._create_named()
        _lock(fd, fcntl.LOCK_EX)  # before it ever has a name
        return fd

    def _create_named(self) -> int:
        # Until it is locked, another process may take it for a leftover: then its name is gone, and
        # another one is made.
        while True:
            name = self._choose_temporary()
            fd = self._hold(os.open(name, _NAMED, 0o600, dir_fd=self._dirfd))
            _lock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return fd

    def _choose_temporary(self) -> str:
        # Noted before it exists, so that an interrupt right after leaves no litter.
        self._temporary = f".diffmergefs-{secrets.token_hex(8)}.tmp"
        return self._temporary

    def _link_new(self) -> None:
        try:
            self._link(self._name)
        except FileExistsError:
            raise self._exists() from None

    def _replace(self) -> None:
        self._refuse_unfit()
        temporary = self._temporary
        if temporary is None:
            temporary = self._choose_temporary()
            self._link(temporary)
        os.replace(temporary, self._name, src_dir_fd=self._dirfd, dst_dir_fd=self._dirfd)
        self._temporary = None

    def _link(self, name: str) -> None:
        # dst_dir_fd is needed even for one's own directory: without it Python calls link(2),
        # which does not follow the link in /proc.
        source = f"/proc/self/fd/{self.target.fd}"
        os.link(source, name, dst_dir_fd=self._dirfd, follow_symlinks=True)

    def _remove_leftovers(self) -> None:
        for name in filter(_TEMPORARY.fullmatch, os.listdir(self._dirfd)):
            path = os.path.join(self._directory, name)
            try:
                if self._remove_unless_held(name):
                    log.info("%s: left by a killed process, removed", path)
            except OSError as error:
                log.info("%s: a temporary file, not removed: %s", path, error.strerror)

    def _remove_unless_held(self, name: str) -> bool:
        if not self._is_own(os.stat(name, dir_fd=self._dirfd, follow_symlinks=False)):
            return False
        fd = os.open(name, _LEFTOVER, dir_fd=self._dirfd)
        try:
            # A shared lock: on NFS an exclusive one needs a descriptor for writing.
            removable = self._is_own(os.fstat(fd)) and _lock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if removable:
                os.unlink(name, dir_fd=self._dirfd)
            return removable
        finally:
            os.close(fd)

    def _is_own(self, status: os.stat_result) -> bool:
        known = (status.st_dev, status.st_ino) in self._inputs
        return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not known

    def _refuse_unfit(self) -> None:
        if self._name in ("", ".", ".."):
            raise OutputRefusedError(f"{self.path}: is a directory; name a file in it")
        try:
            status = os.stat(self._name, dir_fd=self._dirfd, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(status.st_mode):
            raise OutputRefusedError(
                f"{self.path}: exists and is no regular file; choose another output"
            )
        if (status.st_dev, status.st_ino) in self._inputs:
            raise OutputRefusedError(
                f"{self.path}: is a layer of the image itself; choose another output"
            )
        if not self._force:
            raise self._exists()

    def _exists(self) -> OutputRefusedError:
        return OutputRefusedError(
            f"{self.path}: exists; choose another output, or replace it with --force"
        )

    def _abandon(self) -> None:
        with self._held:
            if self._temporary is None:
                return
            try:
                os.unlink(self._temporary, dir_fd=self._dirfd)
            except FileNotFoundError:
                pass
            except OSError as error:
                left = os.path.join(self._directory, self._temporary)
                log.warning("%s: left behind: %s", left, error.strerror)


def _lock(fd: int, how: int) -> bool:
    # False where another process has it, or the filesystem has no locks.
    try:
        fcntl.flock(fd, how)
    except OSError:
        return False
    return True
