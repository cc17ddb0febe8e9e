"""The exception family: what went wrong in one line, with its errno and its exit code."""

from __future__ import annotations

import errno
import unicodedata
from typing import ClassVar, Self

_CONTROLS = frozenset({"Cc", "Zl", "Zp"})


def one_line(text: str) -> str:
    """The text with control characters and line separators as escapes, as in `repr`.

    File names may hold them, and none may forge a line of a log or move a terminal's cursor.
    """
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in _CONTROLS else c for c in text)


def counted(number: int, what: str) -> str:
    """`1 diff`, `2 diffs`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


class DiffMergeError(Exception):
    """An expected failure; `str()` of it is one line: the path, the numbers, the next step.

    `exit_code` is what the command line ends with and `errno` what a mounted view answers. Each
    class that a user can meet has an exit code of its own (docs/exit-codes.md lists them all).
    `check` is a word for what was looked at, for programs.
    """

    exit_code: ClassVar[int] = 3
    errno: ClassVar[int] = errno.EIO
    check: str = ""
    _USUAL_REMEDY: ClassVar[str] = "see docs/exit-codes.md for what its exit code means"

    @property
    def remedy(self) -> str:
        """The next step: what its line ends with, or, where that has none, what usually helps."""
        _, _, step = str(self).partition("; ")
        return step or self._USUAL_REMEDY

    @property
    def is_passing(self) -> bool:
        """Whether the reason may go while every file stays as it is: then ask again."""
        return False

    def __str__(self) -> str:
        return one_line(super().__str__())

    def anew(self) -> Self:
        """The same error without its traceback: who keeps one would keep alive all that the frames
        of the one that was raised hold, open layers among them.
        """
        fresh = type(self).__new__(type(self))
        fresh.args = self.args
        fresh.__dict__.update(self.__dict__)
        return fresh


class BrokenChainError(DiffMergeError):
    """A snapshot whose chain cannot be resolved: missing parent, cycle, too deep, bad metadata."""

    exit_code = 3
    check = "chain"
    _USUAL_REMEDY = (
        "bring back what is missing, mend the snapshot's record, or take the snapshot again"
    )


class SizeMismatchError(DiffMergeError):
    """Layers of one chain differ in their logical size, or a layer is empty (law 3)."""

    exit_code = 4
    check = "size"
    _USUAL_REMEDY = "take the diff again from the base that stands here"


class UntrustedExtentsError(DiffMergeError):
    """A diff's data extents cannot be trusted where it is stored (law 4).

    `check` names the failed check: 'filesystem', 'grain', 'alignment', 'unwritten', 'map',
    'copy-up', 'blocks' or 'filled' (with `--strict`). `--trust-grain` may override all of them but
    the last two. One of 'map' depends on what is in the page cache.
    """

    exit_code = 5

    def __init__(self, message: str, check: str) -> None:
        super().__init__(message)
        self.check = check

    @property
    def is_passing(self) -> bool:
        return self.check == "map"


class DenseDiffError(DiffMergeError):
    """A diff without a hole, where nothing shows that it was meant as a complete image."""

    exit_code = 6
    check = "dense"


class LayerChangedError(DiffMergeError):
    """A layer changed under a view (law 6)."""

    exit_code = 7
    check = "changed"
    _USUAL_REMEDY = "try again once nothing writes to it"


class OutputRefusedError(DiffMergeError):
    """An output that exists already, or that is one of its own inputs."""

    exit_code = 8
    errno = errno.EEXIST


class NoSpaceError(DiffMergeError):
    """The output's filesystem has less free space than what would be copied."""

    exit_code = 9
    errno = errno.ENOSPC


class MountpointError(DiffMergeError):
    """A mountpoint that cannot or must not be used."""

    exit_code = 10
    errno = errno.EINVAL


class MountFailedError(DiffMergeError):
    """The mount could not be made or did not come up."""

    exit_code = 11


class MountTimeoutError(DiffMergeError):
    """The mount did not answer in time."""

    exit_code = 12
    errno = errno.ETIMEDOUT


NO_PROC = "/proc is not mounted, and without it no file can be opened: mount -t proc proc /proc"


class UnsupportedPlatformError(DiffMergeError):
    """Holes can be read on Linux only, and files opened only where /proc is mounted."""

    exit_code = 13
    errno = errno.EOPNOTSUPP


class FileAccessError(DiffMergeError):
    """The operating system refused a file: not found, no permission, a read error."""

    exit_code = 14
    check = "access"
    _USUAL_REMEDY = "see that this user can read it, and that its storage is well"


class BusyError(DiffMergeError):
    """A mount with open files, not unmounted."""

    exit_code = 15
    errno = errno.EBUSY


class VerificationError(DiffMergeError):
    """What was written does not read back as the view (`flatten --verify`)."""

    exit_code = 16


class SealError(DiffMergeError):
    """A seal that is malformed, does not fit its file, or whose checksums do not."""

    exit_code = 17
    check = "seal"
    _USUAL_REMEDY = "bring back the file that was sealed, or take the diff again"


class WriterError(DiffMergeError):
    """A layer that someone has open for writing."""

    exit_code = 18
    errno = errno.EBUSY
    check = "writers"
    _USUAL_REMEDY = "wait until its VMM has closed it"

    @property
    def is_passing(self) -> bool:
        return True


class PinError(DiffMergeError):
    """A parent whose content is not the one that a snapshot records (`parent_content_hash`)."""

    exit_code = 19
    check = "pin"
    _USUAL_REMEDY = "bring back the parent that was recorded, or take the snapshot again"


class MissingExtraError(DiffMergeError):
    """An optional part of the program that is not installed, with the command that installs it."""

    exit_code = 20
    errno = errno.ENOSYS


class PresenceError(DiffMergeError):
    """A presence file (FILE.presence) that is torn, malformed, or does not fit its diff."""

    exit_code = 21
    check = "presence"
    _USUAL_REMEDY = "bring back both files of that save, or save the snapshot again"


class ForeignFormatError(DiffMergeError):
    """A file or directory in a format of others that cannot be merged by its holes."""

    exit_code = 22
    check = "format"


class MountAbortedError(DiffMergeError):
    """A mount whose connection to the kernel was ended from outside: an abort, or `umount -f`."""

    exit_code = 23
    errno = errno.ENOTCONN
