"""One layer: an open image file, its extents, and the check that it does not change (law 6)."""

from __future__ import annotations

import errno
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from diffmergefs.core import beneath, foreign, sparse, workers
from diffmergefs.core.errors import LayerChangedError, SizeMismatchError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.failures import failures
from diffmergefs.core.identity import FileKey, Fingerprint, copied_bits
from diffmergefs.core.sparse import BLOCK, ZEROS

log = logging.getLogger(__name__)

MAX_SIZE = 16 << 40
_counting = threading.Lock()


class Record(NamedTuple):
    """A sidecar whose extents override the filesystem's.

    `suffix` is what its name adds to the layer's (`.bmap` for a seal), `path` is for messages,
    `key` identifies its content, `block` is its unit in bytes. `unchecked` counts the ranges that
    were accepted without comparing a checksum or their bytes.
    """

    suffix: str
    path: str
    key: FileKey
    block: int
    unchecked: int = 0


class LayerFacts(NamedTuple):
    """What is known of an open layer besides its extents. It can be pickled."""

    path: str
    status: os.stat_result
    fingerprint: Fingerprint
    records: tuple[Record, ...]
    tainted: str | None


class LayerExtents(NamedTuple):
    """The ranges of an open layer, by the names that they have there. They can be pickled."""

    walked: ExtentList
    unwritten: ExtentList
    unmapped: ExtentList
    unreported: ExtentList
    extents: ExtentList


class Layer:
    """An open, read-only image file with its data extents.

    `path` is for messages. `size` is the logical size. `walked` are the data extents that the
    filesystem reports, `unwritten` the preallocated ranges (zeros, which may or may not be part of
    `walked`), `unmapped` and `unreported` the ranges where its own map disagrees (see
    `sparse.Walk`). `extents` are the ones in force; they differ from `walked` only for a layer with
    `records`. All of them are as they were when the layer was opened, for the layer's whole life.
    The file is never written, extended or locked. A layer has one descriptor, closed by `close()`
    or with the last reference. Safe to use from several threads.

    `taints` counts the layers that this process found changed since it started. `facts_changed` is
    called when this layer's `facts` have changed, before anyone learns of it.
    """

    taints: ClassVar[int] = 0
    _load_extents: Callable[[], LayerExtents]

    def __init__(self, path: str, fd: int) -> None:
        """Take over `fd`, sync the file and walk its extents. Raises OSError, SizeMismatchError.

        SEEK_DATA is exact and fast only on a clean file, so the file is synced first. The
        fingerprint is taken between the sync and the walk, so a write during the walk is detected.
        """
        try:
            status = os.fstat(fd)
        except OSError:
            os.close(fd)
            raise
        self._take(path, fd, status)
        require_size(path, self.size)
        _sync(fd)
        # With the first size seen, so that growth during the sync is detected too.
        self.fingerprint = Fingerprint.of(fd)._replace(size=self.size)
        found = sparse.walk(fd, self.size)
        self._load_extents = lambda: LayerExtents(*found, extents=found.data)

    def _take(self, path: str, fd: int, status: os.stat_result) -> None:
        self.path, self.fd, self.status, self.size = path, fd, status, status.st_size
        self.tainted: str | None = None
        self.records: tuple[Record, ...] = ()
        self._extents: LayerExtents | None = None
        self.facts_changed: Callable[[Layer], None] | None = None
        self._close = weakref.finalize(self, workers.close, fd, status.st_dev)
        self._close.atexit = False  # the end of the process closes it
        self._recheck = threading.Lock()
        # tmpfs does not support RWF_NOWAIT; its pages are in memory anyway.
        in_memory = sparse.filesystem_magic(fd) == sparse.TMPFS_MAGIC
        self._nowait = 0 if in_memory else os.RWF_NOWAIT

    @classmethod
    def restored(cls, facts: LayerFacts, fd: int, extents: Callable[[], LayerExtents]) -> Layer:
        """The layer with these facts, which another process opened; takes over its `fd`.

        Nothing is synced or walked. `extents` is called when its extents are first used. Raises
        OSError.
        """
        layer = cls.__new__(cls)
        layer._take(facts.path, fd, facts.status)
        layer.fingerprint, layer.records, layer.tainted = facts[2:]
        layer._load_extents = extents
        return layer

    @property
    def walked(self) -> ExtentList:
        """The data extents that the filesystem reports."""
        return self.all_extents.walked

    @property
    def unwritten(self) -> ExtentList:
        """The preallocated ranges."""
        return self.all_extents.unwritten

    @property
    def unmapped(self) -> ExtentList:
        """Ranges where the filesystem's own map has no data: see `sparse.Walk`."""
        return self.all_extents.unmapped

    @property
    def unreported(self) -> ExtentList:
        """Ranges where only the filesystem's own map has data: see `sparse.Walk`."""
        return self.all_extents.unreported

    @property
    def extents(self) -> ExtentList:
        """The data extents in force."""
        return self.all_extents.extents

    @extents.setter
    def extents(self, extents: ExtentList) -> None:
        self._extents = self.all_extents._replace(extents=extents)

    @property
    def facts(self) -> LayerFacts:
        """What `restored` needs besides the descriptor and the extents."""
        return LayerFacts(self.path, self.status, self.fingerprint, self.records, self.tainted)

    @property
    def all_extents(self) -> LayerExtents:
        """All its ranges."""
        # Not by __getattr__: that would slow down each use of all other attributes.
        if self._extents is None:
            self._extents = self._load_extents()
        return self._extents

    @classmethod
    def open(cls, path: str, root: beneath.Root | None = None, name: str | None = None) -> Layer:
        """Open the regular file `path` (beneath the directory descriptor `root`, if given).

        Messages call it `name`, by default `path`. Blocks for the fsync and the walk. Raises
        FileAccessError with that name, and ForeignFormatError if the file's first bytes show that
        it is not a memory image.
        """
        sparse.require_linux()
        name = path if name is None else name
        with failures(name):
            if root is None:
                foreign.require_own_neighbours(path)
            layer = cls(name, beneath.open_regular(root, path))
        if layer.walked.starts and layer.walked.starts[0] == 0:
            foreign.require_own_file(layer.fd, name)
        return layer

    @property
    def key(self) -> FileKey:
        """The identity of the file as it was opened."""
        return FileKey.of(self.status)

    @property
    def mode(self) -> int:
        """The permission bits for a copy of the file: only the owner's if it has an ACL.

        Raises OSError with `path` as its filename.
        """
        try:
            return copied_bits(self.fd, self.status.st_mode)
        except OSError as error:
            error.filename = self.path
            raise

    def adopt(self, extents: ExtentList, record: Record) -> None:
        """Put the extents of a checked record in force, before anything uses the layer's extents.

        If the layer has a record already, the caller makes sure that both have the same extents.
        """
        self.extents = extents
        self.records = (record, *self.records)

    def record(self, suffix: str) -> Record | None:
        """The record with this suffix that is in force, or None."""
        return next((record for record in self.records if record.suffix == suffix), None)

    def close(self) -> None:
        """Close the file; reads fail afterwards."""
        self._close()
        self.fd = -1  # the number may soon be another file's

    def read_into(self, buffer: memoryview, offset: int, *, nowait: bool = False) -> None:
        """Fill the whole of `buffer` with the layer's bytes from `offset` on.

        The fingerprint is not compared: call `check_unchanged` after the bytes were read and
        before they are used. Raises LayerChangedError if the layer is tainted or ends early,
        OSError with `path` as its filename for a failed read, and with `nowait` BlockingIOError if
        the bytes are not in the page cache.
        """
        if self.tainted:
            raise self._changed()
        flags = self._nowait if nowait else 0
        try:
            count = sparse.read_into(self.fd, buffer, offset, flags)
        except OSError as error:
            error.filename = self.path
            raise
        if count < len(buffer):
            if flags:
                # Linux 5.9 and 5.10 return 0 for a miss (preadv2(2), BUGS): only a read that may
                # wait can detect the end of the file.
                raise BlockingIOError(errno.EAGAIN, "a short read with RWF_NOWAIT", self.path)
            self._taint(f"it ends before byte {offset + len(buffer)}, it had {self.size}")

    def is_unchanged(self) -> bool:
        """Whether the fingerprint is still that of the walk; if not, call `check_unchanged`.

        Raises LayerChangedError if the layer is tainted, or its size or mtime moved. Costs one
        fstat; never blocks.
        """
        if self.tainted:
            raise self._changed()
        now, known = os.fstat(self.fd), self.fingerprint
        if (
            now.st_ctime_ns == known.ctime_ns
            and now.st_mtime_ns == known.mtime_ns
            and now.st_size == known.size
            and now.st_blocks == known.blocks
        ):
            return True
        if now.st_size != known.size:
            self._taint(f"its size moved from {known.size} to {now.st_size}")
        if now.st_mtime_ns != known.mtime_ns:
            self._taint(f"its mtime moved from {known.mtime_ns} to {now.st_mtime_ns} ns")
        return False

    def check_unchanged(self) -> None:
        """Raise LayerChangedError unless the bytes read so far are those of the view.

        A moved ctime or block count alone proves no change: chmod, rename, writeback and reading a
        hole of tmpfs move them. Then the extents are walked again. The known extents stay in force
        if they are the same, if there is more data that reads as zeros, or if only preallocated or
        cached ranges are gone. Blocks for the walk.
        """
        if self.is_unchanged():
            return
        with self._recheck:
            if self.is_unchanged():
                return
            _sync(self.fd)
            now = Fingerprint.of(self.fd)
            self._accept(now, sparse.walk(self.fd, self.size).data)

    def _accept(self, now: Fingerprint, extents: ExtentList) -> None:
        gained = ExtentList(extents.outside(self.walked))
        lost = ExtentList(self.walked.outside(extents))
        # Preallocated and reserved ranges count as data while their zeros are in the page cache.
        if any(lost.outside(self.unwritten, self.unmapped)):
            self._taint("data extents are gone")
        elif not all(self.is_zero(start, stop) for start, stop in gained):
            self._taint(f"{gained.data_bytes} bytes became data that are not zeros")
        else:
            log.info(
                "%s: its ctime or block count moved; walked again, %s",
                self.path,
                f"{gained.data_bytes} bytes of holes became written zeros: still as it was"
                if len(gained)
                else f"{lost.data_bytes} bytes that were never written are holes: still as it was"
                if len(lost)
                else "the same extents",
            )
            # If size or mtime moved since is_unchanged, the next comparison detects it, because
            # the accepted fingerprint has the old ones.
            self.fingerprint = now._replace(
                size=self.fingerprint.size, mtime_ns=self.fingerprint.mtime_ns
            )
            if self.facts_changed is not None:
                self.facts_changed(self)

    def is_zero(self, start: int, stop: int) -> bool:
        """Whether the bytes of a range are zeros; the caller must call `check_unchanged`.

        Raises LayerChangedError if the layer ends before `stop`, and OSError.
        """
        buffer = memoryview(bytearray(min(stop - start, BLOCK)))
        for offset in range(start, stop, BLOCK):
            part = buffer[: min(stop - offset, BLOCK)]
            if sparse.read_into(self.fd, part, offset) < len(part):
                self._taint(f"it ends before byte {stop}, it had {self.size}")
            if part != ZEROS[: len(part)]:
                return False
        return True

    def _taint(self, reason: str) -> None:
        with _counting:
            is_news = self.tainted is None
            if is_news:
                self.tainted = reason
                Layer.taints += 1
        if is_news:
            if self.facts_changed is not None:
                self.facts_changed(self)
            log.warning("%s: the layer changed under its views: %s", self.path, reason)
        raise self._changed()

    def _changed(self) -> LayerChangedError:
        return LayerChangedError(
            f"{self.path}: the layer changed while in use: {self.tainted};"
            " its bytes may no longer be those of the view, open it again"
        )


def require_size(path: str, size: int) -> None:
    """Raise SizeMismatchError unless a layer can have this size: 1 byte to 16 TiB."""
    if size == 0:
        raise SizeMismatchError(f"{path}: is empty (0 bytes); a layer has the guest's size")
    if size > MAX_SIZE:
        raise SizeMismatchError(
            f"{path}: {size} bytes, more than the {MAX_SIZE} (16 TiB) that an image can have;"
            " is it a memory file?"
        )


def _sync(fd: int) -> None:
    # squashfs and erofs have no fsync (EINVAL). A file that cannot be written is clean.
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):
            raise
