"""How a filesystem treats a sparse file, tested with an unnamed temporary file."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import BinaryIO

from diffmergefs.checks.diagnosis import Finding
from diffmergefs.core import sparse
from diffmergefs.core.beneath import closing_fd
from diffmergefs.core.errors import DiffMergeError, Target
from diffmergefs.core.extents import PAGE, ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.core.sparse import BLOCK
from diffmergefs.opening.filesystems import untrusted_filesystem
from diffmergefs.opening.trust import grain
from diffmergefs.opening.writers import Writers, writers
from diffmergefs.system.mounttable import mount_of
from diffmergefs.writing.copying import clone_file

_SIZE = 16 << 20
_MIDDLE = 8 << 20  # on a border of any page, huge ones too
_STORED = 12 << 20
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23

_COARSE = (
    "clean memory beside a written page would count as written: a view, and flatten, would show old"
    " bytes or zeros there"
)
_ELSEWHERE = "take diffs on ext4, xfs or btrfs with 4 KiB blocks, or on tmpfs without huge pages"


def examine_filesystem(folder: str, page: int = PAGE) -> Iterator[Finding]:
    """How the filesystem of the directory `folder` treats diffs of pages of `page` bytes.

    Tested with a temporary file there: 16 MiB long, with one written page, and without a name (it
    briefly has one if the filesystem requires that). Is only that page reported as data? Is a page
    of written zeros data too, and a page stored through a mapping? Does a page that is read through
    a mapping stay a hole? Can a file share another's blocks? Does a lease show writers? If nothing
    can be written, only metadata are used. Raises OSError if `folder` cannot be opened.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with closing_fd(os.open(folder, flags)) as fd:
        yield _type(folder, fd)
        unit = grain(fd)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield from _tried(folder, file, page)
    except OSError as error:
        yield Finding(
            folder,
            "probe",
            "warning",
            f"holes could not be tested: {error.strerror}",
            f"only its block size of {unit} bytes hints at how holes are reported",
            "run doctor as a user who can write there",
        )


def _type(folder: str, fd: int) -> Finding:
    reason, mount = _untrusted(folder, fd), mount_of(fd)
    if reason is None:
        kind = mount.kind if mount else "unknown"
        return Finding(folder, "filesystem", "fine", f"a filesystem of type {kind}")
    why = "a diff's holes tell which pages come from its parent"
    return Finding(folder, "filesystem", "wrong", reason, why, _ELSEWHERE)


def _untrusted(folder: str, fd: int) -> str | None:
    # On an overlay new files lie in the upper directory. So does `folder` once a file was made in
    # it; if it is not found there, the file decides.
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return untrusted_filesystem(fd) and untrusted_filesystem(file.fileno())
    except OSError:
        return untrusted_filesystem(fd)


def _tried(folder: str, file: BinaryIO, page: int) -> Iterator[Finding]:
    fd, finding = file.fileno(), partial(Finding, folder)
    os.ftruncate(fd, _SIZE)
    os.pwrite(fd, b"\xa5" * page, _MIDDLE)
    written = _extents(fd)
    if written == ExtentList([(_MIDDLE, _MIDDLE + page)]):
        yield finding("grain", "fine", f"one written page of {page} bytes is {page} bytes of data")
    else:
        text = (
            f"one written page of {page} bytes, but {written.data_bytes} bytes of data are reported"
        )
        yield finding("grain", "wrong", text, _COARSE, _ELSEWHERE)
    yield _zeros(folder, fd, page, written)
    if written.data_bytes == page:
        yield from _mappings(folder, fd, page)
    yield _reflink(folder, fd)
    yield _leases(folder, file)


def _extents(fd: int) -> ExtentList:
    os.fsync(fd)
    return ExtentList(sparse.data_extents(fd, _SIZE))


def _zeros(folder: str, fd: int, page: int, before: ExtentList) -> Finding:
    os.pwrite(fd, bytes(page), 0)
    if _extents(fd).data_bytes > before.data_bytes or before.covers(_SIZE):
        return Finding(folder, "zeros", "fine", "a page of written zeros stays data")
    return Finding(
        folder,
        "zeros",
        "wrong",
        "a page of written zeros becomes a hole",
        "memory that a guest cleared would show its parent's old bytes",
        _ELSEWHERE,
    )


def _mappings(folder: str, fd: int, page: int) -> Iterator[Finding]:
    # The kernel stores and loads the pages itself, so a full filesystem is an error here and not a
    # SIGBUS. Kernels before Linux 5.14 cannot.
    unit = max(page, mmap.PAGESIZE)
    for offset in range(0, _SIZE, BLOCK):
        os.pread(fd, BLOCK, offset)
    with suppress(OSError), mmap.mmap(fd, _SIZE) as memory:
        before = _extents(fd).data_bytes
        memory.madvise(_MADV_POPULATE_WRITE, _STORED, unit)
        stored = _extents(fd).data_bytes - before
        memory.madvise(_MADV_POPULATE_READ, _SIZE - unit, unit)
        loaded = _extents(fd).data_bytes - before - stored
        yield Finding(folder, "mappings", "fine", _exactness(unit, stored))
        if loaded:
            yield _filled_by_readers(folder)


def _exactness(unit: int, stored: int) -> str:
    # The page cache has larger units, and a store may turn a whole unit into data.
    if stored == unit:
        return "exact with write(2), and through mappings"
    return (
        f"exact with write(2), not through mappings: a store of {unit} bytes into a file that was"
        f" read before makes {stored} bytes data, so VMMs should use write(2) for diffs"
    )


def _filled_by_readers(folder: str) -> Finding:
    return Finding(
        folder,
        "readers",
        "warning",
        "a process that maps a diff and reads a hole turns the hole into written zeros",
        "reading a diff without a seal is enough to hide what its parent has there",
        "diffmergefs seal FILE, as the last step of taking a diff",
    )


def _reflink(folder: str, fd: int) -> Finding:
    layer = Layer(folder, os.dup(fd))
    try:
        with tempfile.TemporaryFile(dir=folder) as other:
            os.ftruncate(other.fileno(), _SIZE)
            shared = clone_file(layer, Target(other.fileno(), folder))
    except DiffMergeError as error:
        text = f"blocks cannot be shared: {error}"
        return Finding(folder, "reflink", "fine", text)
    finally:
        layer.close()
    if shared:
        return Finding(folder, "reflink", "fine", "flatten shares blocks here (reflink)")
    return Finding(folder, "reflink", "fine", "no reflink: flatten copies each byte here")


def _leases(folder: str, file: BinaryIO) -> Finding:
    # A lease needs a descriptor that is open for reading only.
    path = f"/proc/self/fd/{file.fileno()}"
    with closing_fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as reader:
        with_writer = writers(reader)
        file.close()
        without = writers(reader)
    if (with_writer, without) == (Writers.SOME, Writers.NONE):
        return Finding(folder, "lease", "fine", "a lease shows whether a process writes to a file")
    return Finding(
        folder,
        "lease",
        "warning",
        f"a lease does not show whether a process writes to a file: for one that is open for"
        f" writing it says '{with_writer.value}', once it is closed '{without.value}'",
        "a diff that its VMM still writes to looks like a finished one",
        "mount and flatten only what its VMM has closed",
    )
