"""`apply_diff`: the classic merge of a diff onto a base, in place, and what forbids it."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, suppress

from diffmergefs.core import beneath, foreign, sparse
from diffmergefs.core.errors import DiffMergeError, OutputRefusedError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.failures import Target, failures
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import require_equal_size
from diffmergefs.core.workers import Progress, ignore_progress
from diffmergefs.opening.filled import require_exact_over
from diffmergefs.opening.opener import Opener
from diffmergefs.opening.trust import TrustPolicy, override_lines
from diffmergefs.opening.writers import is_open_elsewhere
from diffmergefs.sidecars.bmap import SEAL_SUFFIX
from diffmergefs.sidecars.presence import PRESENCE_SUFFIX
from diffmergefs.stores.catalog import LAYOUTS, SHALLOW_LAYOUTS, Catalog, StoreOptions, read_catalog
from diffmergefs.stores.lookup import layout_of, require_mergeable
from diffmergefs.system.mounttable import FILESYSTEM_TYPE, MountTable, mounts, resolved
from diffmergefs.writing.copying import copy_range
from diffmergefs.writing.sealing import remove_seal, require_trusted

log = logging.getLogger(__name__)

#: The reasons why a file is not overwritten, by the names under which each can be overridden.
REASONS = ("sealed", "layer", "links", "open", "mounted", "order")

# Filesystems on which a mere lstat waits for a server.
_REMOTE = ("fuse", "nfs", "cifs", "smb", "9p", "ceph", "autofs")
_MOST_COVERED = 0.9

_DENSE = (
    "a diff without a hole in {} bytes: it would replace the whole base; are the two swapped? DIFF"
    " comes first, then BASE. If it is a complete image, use --dense"
)


def apply_diff(
    diff: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    sync: bool = False,
    policy: TrustPolicy | None = None,
    force: Collection[str] = (),
    progress: Progress = ignore_progress,
) -> int:
    """Copy the data extents of `diff` onto the same ranges of `base`, in place.

    Both are existing regular files of one size; `base` is opened for reading and writing, `diff`
    for reading only. Returns the bytes copied: the diff's data, which is what the guest had
    written. `base` is never extended, truncated or locked, and fsynced only with `sync`; a diff
    without data leaves it untouched. The diff is fsynced, checked against law 4 as `policy` says
    (each check that is overridden is logged as a warning), and compared with its fingerprint at the
    end. If it has a seal or a presence file, the extents are those of that record. It is refused
    while another process has it open for writing, unless `policy.allow_writers`.

    `base` is refused if something depends on it, or if the two look swapped: for each of
    `REASONS` that `force` does not name. What `force` overrides is logged as a warning.
    Then the seal of `base` (BASE.bmap) and its presence file are removed before the first byte is
    written. After an apply that failed or was interrupted, `base` is between before and after; you
    can repeat it, with the same outcome.

    Raises, with `base` untouched, SizeMismatchError, OutputRefusedError (both are one file, or
    something depends on `base`), UntrustedExtentsError, DenseDiffError (no hole, and no
    `policy.dense`), WriterError. Raises LayerChangedError, NoSpaceError, and FileAccessError for
    every other failure of a file.
    """
    policy = policy or TrustPolicy()
    base = os.fspath(base)
    require_mergeable(base, [os.fspath(diff)])
    opened = Opener(policy).open(os.fspath(diff), is_diff=True)
    with closing(opened) as layer, _readable(base) as readable:
        _require_fit(layer, readable, base)
        _warn(require_trusted(layer, policy, _DENSE))
        with failures(layer.path):
            below = functools.partial(_bytes_of, readable)
            _warn(override_lines(require_exact_over(below, layer, policy)))
        if len(layer.extents):
            with failures(base):
                overridden = require_free(readable, base, layer.extents, layer.path, force)
            _warn(overridden)
        with _writable(readable, base) as target:
            if len(layer.extents):
                remove_seal(target.path)
            for start, stop in layer.extents:
                copy_range(layer, start, stop, target, progress)
            with failures(layer.path):
                layer.check_unchanged()
            if sync:
                with failures(target.path, target):
                    os.fsync(target.fd)
    return layer.extents.data_bytes


@contextmanager
def _readable(path: str) -> Iterator[int]:
    # Must be a regular file before it is opened for writing: that alone has effects on a device.
    with failures(path):
        fd = beneath.open_regular(None, path)
    with beneath.closing_fd(fd):
        foreign.require_own_file(fd, path)
        foreign.require_own_neighbours(path)
        yield fd


@contextmanager
def _writable(readable: int, path: str) -> Iterator[Target]:
    with failures(path):
        fd = os.open(f"/proc/self/fd/{readable}", os.O_RDWR | os.O_CLOEXEC)
    with beneath.closing_fd(fd):
        yield Target(fd, path)


def _require_fit(layer: Layer, readable: int, path: str) -> None:
    status = os.fstat(readable)
    if os.path.samestat(status, layer.status):
        raise OutputRefusedError(
            f"{path}: is the same file as the diff {layer.path}; give a copy of the base"
        )
    require_equal_size(path, status.st_size, layer.path, layer.size)


def _bytes_of(fd: int, offset: int, length: int) -> bytearray:
    buffer = bytearray(length)
    sparse.read_into(fd, memoryview(buffer), offset)
    return buffer


def _warn(overridden: list[str]) -> None:
    for line in overridden:
        log.warning("%s", line)


def require_free(
    fd: int, path: str, diff: ExtentList, diff_path: str, force: Collection[str] = ()
) -> list[str]:
    """Raise OutputRefusedError if the file of `fd` should not be overwritten with a diff's extents.

    `fd` is open for reading only, and `path` leads to its file. The message has every reason of
    REASONS that `force` does not name; for each that it names and that holds there is a line in the
    answer. What cannot be determined (another user's file, a filesystem without leases,
    unreadable directories) is no reason. Raises OSError.
    """
    answers = (
        _sealed(path),
        _layer(fd, path),
        _links(fd),
        "someone else has it open" if is_open_elsewhere(fd) else None,
        _mounted(fd, path),
        _order(fd, diff, diff_path),
    )
    found = {name: text for name, text in zip(REASONS, answers, strict=True) if text}
    if refused := {name: text for name, text in found.items() if name not in force}:
        listed = "; ".join(f"{text} ({name})" for name, text in refused.items())
        raise OutputRefusedError(
            f"{path}: not overwritten: {listed}; give a copy that is yours alone, or, if you are"
            f" sure, override it with --force={','.join(refused)}"
        )
    return [f"--force={name} overrides: {path}: {text}" for name, text in found.items()]


def _sealed(path: str) -> str | None:
    for place in dict.fromkeys((path, os.path.realpath(path))):
        for suffix, what in ((SEAL_SUFFIX, "seal"), (PRESENCE_SUFFIX, "presence file")):
            if os.path.lexists(place + suffix):
                return f"it has a {what}, {place}{suffix}, which would be false"
    return None


def _links(fd: int) -> str | None:
    count = os.fstat(fd).st_nlink
    return f"it has {count} names (hard links), all of which would change" if count > 1 else None


def _order(fd: int, diff: ExtentList, diff_path: str) -> str | None:
    held = ExtentList(sparse.data_extents(fd, os.fstat(fd).st_size))
    covered = held.intersection(diff).data_bytes
    if not covered or covered < held.data_bytes * _MOST_COVERED:
        return None
    return (
        f"{diff_path} covers {covered} of its {held.data_bytes} bytes of data: are the two swapped?"
        " DIFF comes first, then BASE"
    )


def _layer(fd: int, path: str) -> str | None:
    real = os.path.realpath(path)
    folder = os.path.dirname(real)
    store = os.path.dirname(folder)
    for root, layouts in (
        (folder, SHALLOW_LAYOUTS),
        (store, {*SHALLOW_LAYOUTS, *_layout(folder, real)}),
    ):
        if not _may_hang(root, real) and (tag := _tag_in(root, layouts, fd, real)):
            return f"it is the layer of '{tag}' in {root}"
    return None


def _layout(folder: str, path: str) -> list[str]:
    # The layout of the file's directory, if that is a snapshot by itself.
    with suppress(DiffMergeError):
        if not _may_hang(folder, path) and (layout := layout_of(folder)):
            return [layout]
    return []


def _mounted(fd: int, path: str) -> str | None:
    real, table = os.path.realpath(path), MountTable()
    for entry in table.entries:
        if entry.kind != FILESYSTEM_TYPE or table.is_ours(source := resolved(entry.source)):
            continue
        if _is_file(source, fd):
            return f"it is the base of the mount on {entry.path}"
        if tag := _tag_in(source, LAYOUTS, fd, real):
            return f"the mount on {entry.path} shows it as the layer of '{tag}'"
    return None


def _tag_in(root: str, layouts: Collection[str], fd: int, path: str) -> str | None:
    # By device and inode: a copy of a layer is not a layer.
    status = os.fstat(fd)
    for catalog in _catalogs(root, layouts, path):
        for tag, snapshot in catalog.snapshots.items():
            if snapshot.memory and snapshot.memory.key[:2] == (status.st_dev, status.st_ino):
                return tag
    return None


def _catalogs(root: str, layouts: Collection[str], path: str) -> Iterator[Catalog]:
    # Layers that need --suffix, --allow-outside or --allow-gaps count too.
    suffix = os.path.splitext(path)[1] or None
    options = StoreOptions(allow_gaps=True, allow_outside=(os.path.dirname(path),))
    for layout in layouts:
        for chosen in dict.fromkeys((None, suffix)):
            with suppress(DiffMergeError):
                yield read_catalog(root, layout, chosen, options=options)


def _may_hang(folder: str, path: str) -> bool:
    # Whether listing `folder` would access a remote mount other than the one of `path`.
    return any(
        os.path.dirname(entry.path) == folder
        and entry.kind.startswith(_REMOTE)
        and not _is_beneath(path, entry.path)
        for entry in mounts()
    )


def _is_beneath(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _is_file(path: str, fd: int) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(fd))
    return False
