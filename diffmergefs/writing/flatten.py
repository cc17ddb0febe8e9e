"""`flatten`: a view written out as a new standalone image."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from diffmergefs.analysis.compare import check_unchanged
from diffmergefs.core import sparse
from diffmergefs.core.errors import VerificationError
from diffmergefs.core.extents import ExtentList, is_aligned
from diffmergefs.core.failures import Target, block_size, described, failures
from diffmergefs.core.sparse import BLOCK, page_aligned
from diffmergefs.core.view import MergedView
from diffmergefs.core.workers import Progress, ignore_progress
from diffmergefs.writing.copying import (
    clone_file,
    clone_ranges,
    copy_range,
    early_writeback,
    output_mode,
    require_space,
    write_at,
)
from diffmergefs.writing.output import OutputFile
from diffmergefs.writing.sealing import remove_seal, write_seal

# Small segments are read together into a buffer of this size.
_BUFFER = 2 << 20

# From this size on, the kernel copies a segment of one layer: on NFS that is the server's work.
_LARGE = _BUFFER

# The segments shared in one go; then the layers are compared and progress is reported.
_BATCH = 1024


@dataclass(frozen=True)
class FlattenResult:
    """What `flatten` wrote: an image of `size` bytes, `holes` of them in no layer.

    `copied` and `shared` (reflinked) are bytes per layer, base first. Their sum is what the layer
    supplies to the view, so `size == sum(copied) + sum(shared) + holes`.
    """

    size: int
    copied: tuple[int, ...]
    shared: tuple[int, ...]
    holes: int

    @property
    def reflinked(self) -> bool:
        """Whether any block is shared with a layer."""
        return any(self.shared)


def flatten(
    view: MergedView,
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    verify: bool = False,
    seal: bool = False,
    progress: Progress = ignore_progress,
) -> FlattenResult:
    """Write the view to `output`, a new sparse file of `view.size` bytes.

    Holes in all layers stay holes, written zeros stay data. Blocks are shared with the layers
    where the filesystem can reflink (FICLONE of the base, FICLONERANGE of each diff's segment on
    whole blocks) and copied elsewhere; the result says which. Only bytes that are visible in the
    view are read. The name always has either the whole new file or what it had before: a file
    without a name is written, fsynced, and linked when it is whole, and then the directory is
    fsynced. Temporary files that killed runs left beside it are removed (see OutputFile). `force`
    replaces an existing file; processes that have it open keep it. The new file has mode 0600, and
    at the end the base's mode without the read bits that another layer lacks. Owner, xattrs and
    times are not copied.

    The seal of a file that existed there before (OUTPUT.bmap) is removed at the end, or with `seal`
    replaced by the seal of the new file.

    `verify` reads the file and the view again and compares them before the file gets its name.
    `progress` is given `sum(view.visible_bytes())` bytes in all. The layers are not written or
    locked. Each is compared with its fingerprint at least once per MiB or buffer copied, and per
    1,024 shared segments, and once more at the end (law 6). You may call this in a thread; it has
    one of its own until it returns.

    Raises OutputRefusedError (the output exists without `force`; or, even with it, is a layer or
    not a regular file), NoSpaceError (less is free than must be copied, or the disk is full),
    VerificationError, LayerChangedError, and FileAccessError for every other failure of a file.
    """
    inputs = [layer.status for layer in view.layers]
    with OutputFile(os.fspath(output), inputs, force=force) as file:
        result = _Merge(view, file.target, progress).run()
        file.finish(output_mode(view.layers[0], view.layers))
        if verify:
            _verify(view, file.target)
        check_unchanged(view.layers)
        file.publish()
    if seal:
        write_seal(os.fspath(output), view.data_extents())
    else:
        remove_seal(os.fspath(output))
    return result


class _Merge:
    # One run over the view's segments into an empty file; counts what it copies and shares.

    def __init__(self, view: MergedView, target: Target, progress: Progress) -> None:
        self.view = view
        self.target = target
        self.visible = view.visible_bytes()
        self.copied = [0] * len(view.layers)
        self.shared = [0] * len(view.layers)
        self._buffer = page_aligned(_BUFFER)
        self._unreported = 0
        self._unchecked: set[int] = set()
        self._progress = progress

    def run(self) -> FlattenResult:
        with failures(self.target.path, self.target):
            os.ftruncate(self.target.fd, self.view.size)
            self._block = block_size(self.target.fd)
        # Sharing comes first, so that the space for all the rest can be checked before it is
        # copied. Neighbours of different layers are one range in `left`.
        left = ExtentList(self._share())
        require_space(self.target, left.data_bytes)
        with early_writeback(self.target.fd) as written:
            for start, stop in left:
                self._copy(start, stop, written)
        self._report()
        holes = self.view.size - sum(self.visible)
        return FlattenResult(self.view.size, tuple(self.copied), tuple(self.shared), holes)

    def _share(self) -> Iterator[tuple[int, int]]:
        # Shares what can be shared, and yields the rest of the data. A layer is not tried again
        # once one of its segments could not be shared.
        lowest = 1 if self._clone_base() else 0
        wanted: Iterator[tuple[int, int, int]] = (
            (start, stop, number)
            for start, stop, number in self.view.segments()
            if number is not None and number >= lowest
        )
        unit = (self._block, self.view.size)
        sharing = set(range(len(self.view.layers)))
        while batch := list(islice(wanted, _BATCH)):
            fit = [s for s in batch if s[2] in sharing and is_aligned(s[0], s[1], *unit)]
            done = clone_ranges(self.view.layers, fit, self.target)
            self._count_shared(fit[:done])
            if done < len(fit):
                # All from there on are processed again, so that the output stays in order.
                sharing.discard(fit[done][2])
                wanted = chain([s for s in batch if s >= fit[done]], wanted)
                batch = [s for s in batch if s < fit[done]]
            if done < len(batch):
                shared = set(fit[:done])
                yield from (s[:2] for s in batch if s not in shared)

    def _count_shared(self, segments: Sequence[tuple[int, int, int]]) -> None:
        counts = Counter[int]()
        for start, stop, number in segments:
            counts[number] += stop - start
        for number, count in counts.items():
            self.shared[number] += count
            self._moved(number, count)

    def _clone_base(self) -> bool:
        # Where no diff has data, the base's bytes and holes are the view's; the rest is
        # overwritten.
        if not self.visible[0] or not clone_file(self.view.layers[0], self.target):
            return False
        self.shared[0] = self.visible[0]
        self._moved(0, self.visible[0])
        return True

    def _copy(self, start: int, stop: int, written: Callable[[int], None]) -> None:
        # A range of the view without holes. Its small segments are read together and written in
        # one call: a call for each would take longer than its bytes.
        while start < stop:
            _, end, number = next(self.view.segments(start, stop - start))
            if number is not None and end - start >= _LARGE:
                moved = functools.partial(self._moved, number)
                copy_range(self.view.layers[number], start, end, self.target, moved)
                self.copied[number] += end - start
            else:
                end = min(stop, start - start % _BUFFER + _BUFFER)
                self._gather(start, end)
            written(end)
            start = end

    def _gather(self, start: int, stop: int) -> None:
        buffer, supplied = self._buffer[: stop - start], dict[int, int]()
        try:
            self.view.fill(buffer, start, supplied)
        except OSError as error:
            path = error.filename or f"{self.target.path}: reading the layers"
            raise described(error, path) from error
        with failures(self.target.path, self.target):
            write_at(self.target.fd, buffer, start)
        for number, count in supplied.items():
            self.copied[number] += count
            self._moved(number, count)

    def _moved(self, number: int, count: int) -> None:
        # Checking a layer, or reporting, may take longer than the copy of a page: once a MiB.
        self._unchecked.add(number)
        self._unreported += count
        if self._unreported >= BLOCK:
            self._report()

    def _report(self) -> None:
        check_unchanged(self.view.layers[number] for number in self._unchecked)
        self._unchecked.clear()
        self._progress(self._unreported)
        self._unreported = 0


def _verify(view: MergedView, target: Target) -> None:
    with failures(target.path):
        # The file was fsynced, so its pages are clean: without them it is read from the disk.
        os.posix_fadvise(target.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for offset in range(0, view.size, BLOCK):
        with failures(f"{target.path}: reading the layers again"):
            expected = view.read(offset, BLOCK)
        written = bytearray(len(expected))
        with failures(target.path):
            length = sparse.read_into(target.fd, memoryview(written), offset)
        if length < len(expected) or written != expected:
            _refute(view, target, offset, expected, written[:length])


def _refute(
    view: MergedView, target: Target, offset: int, expected: bytearray, written: bytearray
) -> None:
    pairs = enumerate(zip(expected, written, strict=False))
    first = offset + next((n for n, (a, b) in pairs if a != b), len(written))
    number = next(view.segments(first, 1)).layer
    source = "a hole in all layers" if number is None else view.layers[number].path
    raise VerificationError(
        f"{target.path}: byte {first} of {view.size} does not read back as the view's, which"
        f" comes from {source}; nothing was written under that name, check the disk and try again"
    )
