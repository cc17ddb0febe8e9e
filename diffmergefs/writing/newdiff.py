"""Writing a new diff, and the proof that exactly the intended ranges are data in it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

from diffmergefs.analysis.compare import check_unchanged
from diffmergefs.core.errors import UntrustedExtentsError, counted
from diffmergefs.core.extents import ExtentList, Segment, is_aligned
from diffmergefs.core.failures import block_size, failures
from diffmergefs.core.layer import Layer
from diffmergefs.core.sparse import BLOCK, ZEROS
from diffmergefs.core.view import MergedView
from diffmergefs.core.workers import Progress, ignore_progress
from diffmergefs.opening.trust import TrustPolicy, override_lines, problems, require_none
from diffmergefs.writing.copying import (
    clone_ranges,
    copy_through_buffer,
    output_mode,
    require_space,
    write_at,
)
from diffmergefs.writing.output import OutputFile
from diffmergefs.writing.sealing import remove_seal, write_seal

_REMEDY = (
    "nothing was written under that name; choose an output on ext4, xfs, btrfs or tmpfs"
    " without huge pages, seal it there, and copy it with its seal"
)


@dataclass(frozen=True)
class WrittenDiff:
    """A new diff: `size` bytes, of which `data_bytes` in `extents` ranges are data.

    The data are `copied` and `shared` (reflinked) bytes. `dense` means that there is no hole: such
    a diff hides everything below it, and is accepted only with `--dense`. `overridden` has a line
    for each check that the output's filesystem failed and the policy overrode.
    """

    size: int
    data_bytes: int
    extents: int
    copied: int
    shared: int
    dense: bool
    overridden: tuple[str, ...]


class NewDiff:
    """A context manager for a diff at `path` with the bytes of `source` in the ranges `put`.

    The file gets its name by `publish`, whole or not at all. See `output.OutputFile`, also for what
    is refused; `inputs` are layers that the file may not replace, besides those of `source`.
    Entering raises UntrustedExtentsError for a filesystem on which no diff of the policy's pages
    can be trusted (law 4). Segments of 1 MiB and more are shared with the source's layers where the
    filesystem can; the rest is written, including zeros. `put` ranges in ascending order.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        source: MergedView,
        inputs: Sequence[Layer] = (),
        *,
        policy: TrustPolicy | None = None,
        force: bool = False,
    ) -> None:
        self.path = os.fspath(path)
        self._policy = policy or TrustPolicy()
        self._source = source
        self._inputs = list(dict.fromkeys([*source.layers, *inputs]))
        statuses = [layer.status for layer in self._inputs]
        self._file = OutputFile(self.path, statuses, force=force)
        self._put: list[ExtentList] = []
        self._sharing: dict[Layer, bool] = {}
        self.copied = 0
        self.shared = 0

    def __enter__(self) -> NewDiff:
        with ExitStack() as stack:
            self._target = stack.enter_context(self._file).target
            with failures(self.path, self._target):
                os.ftruncate(self._target.fd, self._source.size)
                self._block = block_size(self._target.fd)
            with closing(self._reopened()) as empty:
                self._require_trust(empty, complete=False)
            stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(None, None, None)

    def put(self, extents: ExtentList, progress: Progress = ignore_progress) -> None:
        """Make these ranges data, with the source's bytes; holes become written zeros.

        Fingerprints are not compared. Raises
        NoSpaceError, LayerChangedError where a layer ends early, and FileAccessError.
        """
        self._put.append(extents)
        shared = self._share(extents, progress)
        require_space(self._target, extents.data_bytes - sum(shared.values()))
        for start, stop, number in self._segments(extents):
            if start in shared:
                continue
            if number is None:
                self._write_zeros(start, stop, progress)
            else:
                layer = self._source.layers[number]
                copy_through_buffer(layer, start, stop, self._target, progress)
            self.copied += stop - start

    def publish(
        self,
        *,
        seal: bool = False,
        check: Callable[[Layer], None] = lambda layer: None,
    ) -> WrittenDiff:
        """Prove that the file is as intended, and give it its name.

        The file is fsynced. Its data extents must be exactly what was put, and pass the checks of
        law 4. `check` gets the file as a layer, without its cached pages, and may raise. Then the
        inputs are compared with their fingerprints (law 6). Afterwards a seal beside the name is
        removed, or with `seal` replaced by the new file's. The mode is that of the source's newest
        layer, without read bits that another input lacks. Raises UntrustedExtentsError,
        LayerChangedError, and what OutputFile raises.
        """
        self._file.finish(output_mode(self._source.layers[-1], self._inputs))
        extents = ExtentList(itertools.chain.from_iterable(self._put))
        dense = extents.covers(self._source.size)
        with closing(self._reopened()) as layer:
            overridden = self._require_trust(layer, complete=dense)
            self._require_extents(layer, extents)
            with failures(self.path):
                os.posix_fadvise(layer.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            check(layer)
        check_unchanged(self._inputs)
        self._file.publish()
        if seal:
            write_seal(self.path, extents, self._policy.page_size)
        else:
            remove_seal(self.path)
        return WrittenDiff(
            size=self._source.size,
            data_bytes=extents.data_bytes,
            extents=len(extents),
            copied=self.copied,
            shared=self.shared,
            dense=dense,
            overridden=tuple(overridden),
        )

    def _segments(self, extents: ExtentList) -> Iterator[Segment]:
        for start, stop in extents:
            yield from self._source.segments(start, stop - start)

    def _share(self, extents: ExtentList, progress: Progress) -> dict[int, int]:
        # Shares the large segments where possible, and gives the length of each by its start. A
        # call for each page would cost more than writing it does.
        shared = {}
        for start, stop, number in self._segments(extents):
            is_whole = is_aligned(start, stop, self._block, self._source.size)
            if number is None or stop - start < BLOCK or not is_whole:
                continue
            layer = self._source.layers[number]
            wanted = [(start, stop, number)]
            if self._may_share(layer) and clone_ranges(self._source.layers, wanted, self._target):
                shared[start] = stop - start
                self.shared += stop - start
                progress(stop - start)
            else:
                self._sharing[layer] = False
        return shared

    def _may_share(self, layer: Layer) -> bool:
        # No if the layer's file may have a hole or unwritten blocks in what counts as its data: a
        # shared hole is a hole.
        if layer not in self._sharing:
            may_lack = len(layer.unwritten) or len(layer.unmapped) or layer.records
            self._sharing[layer] = not may_lack
        return self._sharing[layer]

    def _write_zeros(self, start: int, stop: int, progress: Progress) -> None:
        for offset in range(start, stop, BLOCK):
            part = memoryview(ZEROS)[: min(BLOCK, stop - offset)]
            with failures(self.path, self._target):
                write_at(self._target.fd, part, offset)
            progress(len(part))

    def _reopened(self) -> Layer:
        # The file as its readers will see it; Layer fsyncs it and walks its extents.
        with failures(self.path, self._target):
            fd = os.open(f"/proc/self/fd/{self._target.fd}", os.O_RDONLY | os.O_CLOEXEC)
            return Layer(self.path, fd)

    def _require_trust(self, layer: Layer, *, complete: bool) -> list[str]:
        found = list(problems(layer, self._policy.page_size, complete=complete))
        require_none((replace(problem, remedy=_REMEDY) for problem in found), self._policy)
        return override_lines(found)

    def _require_extents(self, layer: Layer, extents: ExtentList) -> None:
        if layer.walked != extents:
            written = counted(len(extents), "extent")
            raise UntrustedExtentsError(
                f"{self.path}: {extents.data_bytes} bytes in {written} were written,"
                f" but its filesystem reports {layer.walked.data_bytes} in {len(layer.walked)} as"
                f" data, so the diff would not be the intended one; {_REMEDY}",
                "filesystem",
            )
