"""New files and directories that get their name in one step once they are whole (law 8)."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from typing import ClassVar, Self

from diffmergefs.core.beneath import closing_fd
from diffmergefs.core.errors import FileAccessError, NoSpaceError, OutputRefusedError
from diffmergefs.core.failures import NO_SPACE, Target, failures, free_bytes

log = logging.getLogger(__name__)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_UNNAMED = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
_NAMED = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC
# Kernels and filesystems without O_TMPFILE; the directory itself is open by then.
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})
# O_NONBLOCK: a FIFO of such a name must not block the open.
_LEFTOVER = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_EXISTS = "exists; choose another output, or replace it with --force"


class _Output:
    # Until it is published, the output has no name or a temporary one, and a flock. The next writer
    # in that directory removes what a killed process left there: such names without a lock.

    _suffix: ClassVar[str]
    _is_kind: Callable[[int], bool]  # of a file's mode
    _refuse_unfit: Callable[[], None]
    _make: Callable[[str], int]  # under this name; answers a descriptor
    _remove: Callable[[str], None]  # what has this name

    def __init__(self, path: str, location: str, inputs: Iterable[os.stat_result] = ()) -> None:
        self.path = path
        self._directory, self._name = os.path.split(location)
        self._inputs = {(s.st_dev, s.st_ino) for s in inputs}
        self._temporary: str | None = None
        self._held = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack, failures(self.path):
            stack.callback(self._abandon)
            self._dirfd = self._hold(self._open_directory())
            self._refuse_unfit()
            self._remove_leftovers()
            self._fd = self._made()
            stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._abandon()

    def _open_directory(self) -> int:
        try:
            return os.open(self._directory or ".", _DIRECTORY)
        except FileNotFoundError as error:
            raise FileAccessError(
                f"{self.path}: {error.strerror}: {self._directory}; make the directory first"
            ) from error

    def _hold(self, fd: int) -> int:
        return self._held.enter_context(closing_fd(fd))

    def _made(self) -> int:
        try:
            return self._create()
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise NoSpaceError(
                f"{self.path}: {error.strerror}: cannot create it, {free_bytes(self._dirfd)} bytes"
                " are free on its filesystem; make room or choose another output"
            ) from error

    def _create(self) -> int:
        # Until it is locked, another process may take it for a leftover and remove it: then create
        # another one.
        while True:
            fd = self._hold(self._make(self._choose_temporary()))
            _lock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return fd

    def _choose_temporary(self) -> str:
        # Noted before it exists, so that an interrupt right after leaves no litter.
        self._temporary = f".diffmergefs-{secrets.token_hex(8)}{self._suffix}"
        return self._temporary

    def _remove_leftovers(self) -> None:
        temporary = re.compile(rf"\.diffmergefs-[0-9a-f]{{16}}\{self._suffix}")
        for name in filter(temporary.fullmatch, os.listdir(self._dirfd)):
            path = os.path.join(self._directory, name)
            try:
                if self._remove_unless_held(name):
                    log.info("%s: left by a killed process, removed", path)
            except OSError as error:
                log.info("%s: temporary, but cannot be removed: %s", path, error.strerror)

    def _remove_unless_held(self, name: str) -> bool:
        if not self._is_own(os.stat(name, dir_fd=self._dirfd, follow_symlinks=False)):
            return False
        with closing_fd(os.open(name, _LEFTOVER, dir_fd=self._dirfd)) as fd:
            # A shared lock: on NFS an exclusive one needs a descriptor for writing.
            removable = self._is_own(os.fstat(fd)) and _lock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if removable:
                self._remove(name)
            return removable

    def _is_own(self, status: os.stat_result) -> bool:
        is_input = (status.st_dev, status.st_ino) in self._inputs
        return self._is_kind(status.st_mode) and status.st_uid == os.geteuid() and not is_input

    def _refused(self, reason: str) -> OutputRefusedError:
        return OutputRefusedError(f"{self.path}: {reason}; choose another output")

    def _status(self) -> os.stat_result | None:
        try:
            return os.stat(self._name, dir_fd=self._dirfd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _abandon(self) -> None:
        with self._held:
            if self._temporary is None:
                return
            try:
                self._remove(self._temporary)
            except FileNotFoundError:
                pass
            except OSError as error:
                left = os.path.join(self._directory, self._temporary)
                log.warning("%s: left behind: %s", left, error.strerror)


class OutputFile(_Output):
    """A context manager for a file that is being written; `target` is where to write.

    The file has no name (O_TMPFILE) or, where the filesystem cannot do that, a temporary one in the
    output's directory, and mode 0600 until `finish`. Leaving the context before `publish` removes
    it, whatever the exception. Entering removes what a killed process left in that directory under
    a temporary name: regular files of this user that are no input and that nobody holds (a writer
    keeps a flock until its end; where there are no locks, nothing is removed). Raises
    OutputRefusedError for an output that exists without `force`, that is one of `inputs`, or that
    is no regular file, even with `force` (a symlink is not followed); NoSpaceError where there
    is no room for a new file; FileAccessError where the directory cannot be written. `location` is
    another path of the same place, for opening: `path` is then for messages only.
    """

    _suffix = ".tmp"
    _is_kind = staticmethod(stat.S_ISREG)

    def __init__(
        self,
        path: str,
        inputs: Collection[os.stat_result],
        *,
        force: bool = False,
        location: str | None = None,
    ) -> None:
        super().__init__(path, location or path, inputs)
        self._force = force

    @property
    def target(self) -> Target:
        """The file, open for reading and writing."""
        return Target(self._fd, self.path)

    def write(self, content: bytes) -> None:
        """Write all of the file's content. Raises FileAccessError, NoSpaceError."""
        with failures(self.path, self.target), open(self.target.fd, "wb", closefd=False) as stream:
            stream.write(content)

    def finish(self, mode: int) -> None:
        """Give the file its mode and fsync it. Raises FileAccessError, NoSpaceError."""
        with failures(self.path, self.target):
            os.fchmod(self.target.fd, mode)
            os.fsync(self.target.fd)

    def publish(self) -> None:
        """Put the file, whole and synced, under its name in one step, and fsync the directory.

        Without `force` a file that was created there meanwhile is refused. With it, that file is
        replaced, and processes that have it open keep it. Raises like the context manager; if only
        the directory's fsync fails, the whole file is in place.
        """
        with failures(self.path, self.target):
            if self._force:
                self._replace()
            else:
                try:
                    self._link(self._name)
                except FileExistsError:
                    raise OutputRefusedError(f"{self.path}: {_EXISTS}") from None
            os.fsync(self._dirfd)

    def _create(self) -> int:
        try:
            fd = self._hold(os.open(".", _UNNAMED, 0o600, dir_fd=self._dirfd))
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            return super()._create()
        _lock(fd, fcntl.LOCK_EX)  # before it ever has a name
        return fd

    def _make(self, name: str) -> int:
        return os.open(name, _NAMED, 0o600, dir_fd=self._dirfd)

    def _remove(self, name: str) -> None:
        os.unlink(name, dir_fd=self._dirfd)

    def _replace(self) -> None:
        self._refuse_unfit()
        if (temporary := self._temporary) is None:
            temporary = self._choose_temporary()
            self._link(temporary)
        os.replace(temporary, self._name, src_dir_fd=self._dirfd, dst_dir_fd=self._dirfd)
        self._temporary = None

    def _link(self, name: str) -> None:
        # dst_dir_fd is needed even for one's own directory: without it Python calls link(2),
        # which does not follow the link in /proc.
        source = f"/proc/self/fd/{self.target.fd}"
        os.link(source, name, dst_dir_fd=self._dirfd, follow_symlinks=True)

    def _refuse_unfit(self) -> None:
        if self._name in ("", ".", ".."):
            raise OutputRefusedError(f"{self.path}: is a directory; name a file in it")
        if (status := self._status()) is None:
            return
        if not stat.S_ISREG(status.st_mode):
            raise self._refused("exists and is no regular file")
        if (status.st_dev, status.st_ino) in self._inputs:
            raise self._refused("is a layer of the image itself")
        if not self._force:
            raise OutputRefusedError(f"{self.path}: {_EXISTS}")


class OutputDirectory(_Output):
    """A context manager for a directory that is being filled; `target` is where to fill it.

    `final` is the absolute path that `publish` gives it. Until then it has a temporary name beside
    that and mode 0700; leaving the context before removes it with all its contents. Entering
    removes such directories of this user that a killed process left there and nobody holds. Raises
    OutputRefusedError if anything exists under the output's name, FileAccessError where its parent
    directory cannot be written, and NoSpaceError.
    """

    _suffix = ".new"  # stores ignore such names
    _is_kind = staticmethod(stat.S_ISDIR)

    def __init__(self, path: str) -> None:
        # Without a slash at the end; an empty name stays one.
        self.final = os.path.abspath(path) if path else ""
        super().__init__(path, self.final)

    @property
    def target(self) -> str:
        """The path of the directory."""
        return os.path.join(self._directory, self._temporary or self._name)

    def publish(self, mode: int) -> None:
        """Give the directory its mode and, in one step, its name; both are synced.

        What was written in it must be synced by then. Raises like the context manager.
        """
        with failures(self.path):
            os.fchmod(self._fd, mode)
            os.fsync(self._fd)
            self._refuse_unfit()
            os.rename(self.target, self.final)
            self._temporary = None
            os.fsync(self._dirfd)

    def _make(self, name: str) -> int:
        os.mkdir(name, 0o700, dir_fd=self._dirfd)
        return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._dirfd)

    def _remove(self, name: str) -> None:
        shutil.rmtree(name, dir_fd=self._dirfd)

    def _refuse_unfit(self) -> None:
        if not self._name:
            raise OutputRefusedError(f"{self.path!r}: names no new directory")
        if self._status() is not None:
            raise self._refused("exists")


def sync_directory(path: str) -> None:
    """fsync the directory `path`, so that the names in it last. Raises OSError."""
    with closing_fd(os.open(path, _DIRECTORY)) as fd:
        os.fsync(fd)


def _lock(fd: int, how: int) -> bool:
    # False where another process has it, or the filesystem has no locks.
    try:
        fcntl.flock(fd, how)
    except OSError:
        return False
    return True
