"""The exceptions: each says in one line what went wrong, and has an errno and an exit code."""

from __future__ import annotations

import errno
import os
import unicodedata
from typing import ClassVar, Self

_CONTROLS = frozenset({"Cc", "Zl", "Zp"})


def one_line(text: str) -> str:
    """The text with control characters and line separators escaped, as in `repr`.

    A file name may contain them; it must not forge a line in a log or move a terminal's cursor.
    """
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in _CONTROLS else c for c in text)


def os_error(number: int, path: str | None = None) -> OSError:
    """The OSError of this errno, with its usual text."""
    return OSError(number, os.strerror(number), path)


def counted(number: int, what: str) -> str:
    """`1 diff`, `2 diffs`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


class DiffMergeError(Exception):
    """An expected failure. `str()` gives one line: the path, the numbers, the next step.

    The command line exits with `exit_code`; a mounted view answers with `errno`. Each class that a
    user can meet has its own exit code (docs/exit-codes.md lists them all). `check` names, for
    programs, what was checked.
    """

    exit_code: ClassVar[int] = 3
    errno: int = errno.EIO
    check: str = ""
    #: Whether the cause may go away without a change to any file, so that a retry can help.
    is_passing: bool = False
    _USUAL_REMEDY: ClassVar[str] = "see docs/exit-codes.md for what its exit code means"

    @property
    def remedy(self) -> str:
        """The next step: the end of the message, or what usually helps if the message has none."""
        _, _, step = str(self).partition("; ")
        return step or self._USUAL_REMEDY

    def __str__(self) -> str:
        return one_line(super().__str__())

    def anew(self) -> Self:
        """The same error without its traceback, for callers that store it.

        A traceback keeps alive everything that its frames hold, open layers included.
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
        "restore what is missing, correct the snapshot's record, or take the snapshot again"
    )


class SizeMismatchError(DiffMergeError):
    """Layers of one chain differ in their logical size, or a layer is empty (law 3)."""

    exit_code = 4
    check = "size"
    _USUAL_REMEDY = "take the diff again from this base"


class UntrustedExtentsError(DiffMergeError):
    """A diff's data extents cannot be trusted on the filesystem that stores it (law 4).

    `check` names the failed check: 'filesystem', 'grain', 'alignment', 'unwritten', 'map',
    'copy-up', 'blocks' or 'filled' (with `--strict`). `--trust-grain` can override all but the
    last two. The result of 'map' depends on what is in the page cache.
    """

    exit_code = 5
    _USUAL_REMEDY = "take the diff again on a suitable filesystem, or use --trust-grain"

    def __init__(self, message: str, check: str) -> None:
        super().__init__(message)
        self.check = check
        self.is_passing = check == "map"


class DenseDiffError(DiffMergeError):
    """A diff without holes that nothing identifies as a complete image."""

    exit_code = 6
    check = "dense"
    _USUAL_REMEDY = "take the diff again, or use --dense if it is a complete image"


class LayerChangedError(DiffMergeError):
    """A layer changed under a view (law 6)."""

    exit_code = 7
    check = "changed"
    _USUAL_REMEDY = "try again once nothing writes to it"


class OutputRefusedError(DiffMergeError):
    """An output that already exists or is one of its own inputs."""

    exit_code = 8
    errno = errno.EEXIST
    _USUAL_REMEDY = "choose another output"


class NoSpaceError(DiffMergeError):
    """The output's filesystem has less free space than the copy needs."""

    exit_code = 9
    errno = errno.ENOSPC
    _USUAL_REMEDY = "free some space, or write to another filesystem"


class MountpointError(DiffMergeError):
    """A mountpoint that cannot or must not be used."""

    exit_code = 10
    errno = errno.EINVAL
    _USUAL_REMEDY = "choose an empty directory elsewhere"


class MountFailedError(DiffMergeError):
    """The mount could not be created or did not start."""

    exit_code = 11
    _USUAL_REMEDY = "run `diffmergefs doctor` to find the cause"


class MountTimeoutError(DiffMergeError):
    """The mount did not answer in time."""

    exit_code = 12
    errno = errno.ETIMEDOUT
    _USUAL_REMEDY = "find out why its daemon or its storage does not answer"


NO_PROC = "/proc is not mounted, and no file can be opened without it: mount -t proc proc /proc"


class UnsupportedPlatformError(DiffMergeError):
    """This is not Linux, or /proc is not mounted: holes cannot be read, or files not opened."""

    exit_code = 13
    errno = errno.EOPNOTSUPP
    _USUAL_REMEDY = "use Linux, with /proc mounted"


_REMEDIES = {
    os.strerror(number): step
    for numbers, step in (
        ((errno.ENOENT,), "check its name"),
        ((errno.EACCES, errno.EPERM), "use an account that has this permission, or change it"),
        ((errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP), "check the path"),
        ((errno.EISDIR,), "name a file"),
        ((errno.EROFS,), "choose a place that can be written"),
        ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "write it where there is more space"),
        ((errno.EIO,), "check the storage"),
        ((errno.ENOTCONN, errno.ECONNABORTED), "unmount it: the daemon of this mount died"),
        ((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    )
    for number in numbers
}


class FileAccessError(DiffMergeError):
    """The operating system refused a file: not found, no permission, a read error."""

    exit_code = 14
    check = "access"
    _USUAL_REMEDY = "check that this user can read it and that its storage works"

    @property
    def remedy(self) -> str:
        """The next step, by the operating system's reason at the end of the message."""
        reason = str(self).rpartition(": ")[2]
        if reason.endswith("not a regular file"):
            return "name a file"
        return _REMEDIES.get(reason) or super().remedy


class BusyError(DiffMergeError):
    """A mount that was not unmounted because files in it are open."""

    exit_code = 15
    errno = errno.EBUSY
    _USUAL_REMEDY = "stop the programs that use it"


class VerificationError(DiffMergeError):
    """The output does not read back as the view (`flatten --verify`)."""

    exit_code = 16
    _USUAL_REMEDY = "check the disk, and try again"


class SealError(DiffMergeError):
    """A seal that is malformed, or whose size or checksums do not match its file."""

    exit_code = 17
    check = "seal"
    _USUAL_REMEDY = "restore the file that was sealed, or take the diff again"


class WriterError(DiffMergeError):
    """A layer that someone has open for writing."""

    exit_code = 18
    errno = errno.EBUSY
    check = "writers"
    is_passing = True
    _USUAL_REMEDY = "wait until its VMM has closed it"


class PinError(DiffMergeError):
    """A parent whose content differs from the hash in the snapshot (`parent_content_hash`)."""

    exit_code = 19
    check = "pin"
    _USUAL_REMEDY = "restore the recorded parent, or take the snapshot again"


class MissingExtraError(DiffMergeError):
    """A Python package is not installed; the message has the command that installs it."""

    exit_code = 20
    errno = errno.ENOSYS
    _USUAL_REMEDY = "install it"


class PresenceError(DiffMergeError):
    """A presence file (FILE.presence) that is incomplete, malformed, or of another diff."""

    exit_code = 21
    check = "presence"
    _USUAL_REMEDY = "restore both files of that save, or save the snapshot again"


class ForeignFormatError(DiffMergeError):
    """A file or directory in a foreign format, whose holes do not say what is data."""

    exit_code = 22
    check = "format"
    _USUAL_REMEDY = "export it as a raw memory file with the tools of its format"


class MountAbortedError(DiffMergeError):
    """A mount whose FUSE connection someone else ended: by an abort, or `umount -f`."""

    exit_code = 23
    errno = errno.ENOTCONN
    _USUAL_REMEDY = "find out who ended it, and mount again"
