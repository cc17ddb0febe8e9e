"""`apply_diff`: the classic merge of a diff onto a base, in place."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager

from diffmergefs.core import beneath, foreign, sparse
from diffmergefs.core.errors import DenseDiffError, OutputRefusedError, Target, failures
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import require_equal_size
from diffmergefs.core.workers import Progress, ignore_progress
from diffmergefs.opening.filled import require_exact_over
from diffmergefs.opening.opener import Opener
from diffmergefs.opening.trust import TrustPolicy, override_lines, require_trust
from diffmergefs.opening.writers import require_no_writers
from diffmergefs.stores.lookup import require_mergeable
from diffmergefs.writing.copying import copy_range
from diffmergefs.writing.dependants import require_free
from diffmergefs.writing.sealing import remove_seal

log = logging.getLogger(__name__)


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
    `dependants.REASONS` that `force` does not name. What `force` overrides is logged as a warning.
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
        _require_trusted_diff(layer, policy)
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


def _require_trusted_diff(layer: Layer, policy: TrustPolicy) -> None:
    dense = layer.extents.covers(layer.size)
    overridden = require_no_writers([layer], allowed=policy.allow_writers)
    problems = require_trust(layer, policy, complete=dense and policy.dense)
    overridden += override_lines(problems)
    _warn(overridden)
    if dense and not policy.dense:
        raise DenseDiffError(
            f"{layer.path}: a diff without a hole in {layer.size} bytes: it would replace the whole"
            " base; are the two swapped? DIFF comes first, then BASE. If it is a complete image,"
            " use --dense"
        )


def _bytes_of(fd: int, offset: int, length: int) -> bytearray:
    buffer = bytearray(length)
    sparse.read_into(fd, memoryview(buffer), offset)
    return buffer


def _warn(overridden: list[str]) -> None:
    for line in overridden:
        log.warning("%s", line)
