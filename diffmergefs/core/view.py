"""The merged view of a chain: one plan, `segments`, and exact reads that follow it."""

from __future__ import annotations

import errno
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence

from diffmergefs.core.errors import BrokenChainError, SizeMismatchError, counted
from diffmergefs.core.extents import MAX_LAYERS, ExtentList, Segment, SegmentMap
from diffmergefs.core.layer import Layer
from diffmergefs.core.sparse import BLOCK, ZEROS

#: The layer number of bytes that no layer supplies.
HOLE = -1
# FUSE files, for example, do not support RWF_NOWAIT (EOPNOTSUPP).
_MISSES = frozenset({errno.EAGAIN, errno.EOPNOTSUPP})


class MergedView:
    """A chain of open layers as one complete, read-only image of `size` bytes.

    `layers` are base first, 1 to 1,000, all of the same size. The view trusts their extents
    (`diffmergefs.opening.trust` checks them). Nothing is copied and no layer is ever written. Safe
    to use from several threads. As a context manager it closes its layers.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        """Raises SizeMismatchError, naming both files and both sizes."""
        if not 1 <= len(layers) <= MAX_LAYERS:
            raise BrokenChainError(
                f"a chain of {counted(len(layers), 'layer')}; 1 to {MAX_LAYERS} can be"
            )
        for layer in layers[1:]:
            require_equal_size(layers[0].path, layers[0].size, layer.path, layer.size)
        self.layers = tuple(layers)
        self.size = layers[0].size
        self._saved_map: Callable[[], SegmentMap] | None = None

    @classmethod
    def restored(cls, layers: Sequence[Layer], segments: Callable[[], SegmentMap]) -> MergedView:
        """The view of these layers that another process merged.

        `segments` returns what `merged` was there. It is called when the view is first used.
        """
        view = cls(layers)
        view._saved_map = segments
        return view

    @property
    def merged(self) -> SegmentMap:
        """The merge of its layers. It can be pickled."""
        return self._map

    @functools.cached_property
    def _map(self) -> SegmentMap:
        # Merged at the first use, so callers that only validate a chain do not pay for the merge.
        if self._saved_map is not None:
            known = _MAPS[self.layers] = self._saved_map()
            return known
        return _merged(self.layers)

    def __enter__(self) -> MergedView:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the layers, also for other views that share them."""
        for layer in self.layers:
            layer.close()

    def segments(self, offset: int = 0, length: int | None = None) -> Iterator[Segment]:
        """Which layers supply `[offset, offset + length)`, clipped to the image; by default all.

        The segments tile the window exactly: sorted, never empty, neighbours of one layer joined,
        and a hole in every layer is a segment of layer None. No file is accessed. Raises ValueError
        for a negative offset or length.
        """
        if offset < 0 or (length is not None and length < 0):
            raise ValueError(f"negative window: offset {offset}, length {length}")
        stop = self.size if length is None else min(offset + length, self.size)
        return map(Segment._make, self._map.window(offset, stop))

    def read(self, offset: int, length: int) -> bytearray:
        """The bytes of `[offset, offset + length)`, fewer only where the image ends.

        Only the bytes that a layer supplies are read from it; then every layer that was read is
        compared with its fingerprint (law 6). Raises ValueError for a negative offset or length,
        LayerChangedError, OSError; never returns short or mixed bytes. May block.
        """
        data = self._room(offset, length)
        self.fill(memoryview(data), offset, {})
        return data

    def read_nowait(self, offset: int, length: int) -> bytearray | None:
        """Like `read`, but None if it would block: then call `read` in a thread."""
        data = self._room(offset, length)
        return data if self.fill_nowait(memoryview(data), offset, {}) == len(data) else None

    def _room(self, offset: int, length: int) -> bytearray:
        if offset < 0 or length < 0:
            raise ValueError(f"negative window: offset {offset}, length {length}")
        return bytearray(max(0, min(length, self.size - offset)))

    def fill_nowait(self, buffer: memoryview, offset: int, supplied: dict[int, int]) -> int:
        """Fill `buffer` from `offset` on as far as possible without waiting; how many bytes it did.

        `[offset, offset + len(buffer))` must lie within the image, and `supplied` must be empty. If
        the whole buffer is filled, it holds the view's bytes, and `supplied` has the number of
        bytes from each layer (`HOLE`: from none). If not, call `fill` for the rest. Raises
        LayerChangedError, OSError.
        """
        done = self._pour(buffer, offset, supplied, 0, True)
        for number in supplied:
            if number != HOLE and not self.layers[number].is_unchanged():
                supplied.clear()
                return 0
        return done

    def fill(
        self, buffer: memoryview, offset: int, supplied: dict[int, int], done: int = 0
    ) -> None:
        """Fill all of `buffer` with the view's bytes from `offset` on.

        To continue after `fill_nowait`, pass its result as `done` and its `supplied`. Requires,
        reports and raises what `fill_nowait` does. May block.
        """
        self._pour(buffer, offset, supplied, done, False)
        for number in supplied:
            if number != HOLE:
                self.layers[number].check_unchanged()

    def _pour(
        self,
        buffer: memoryview,
        offset: int,
        supplied: dict[int, int],
        done: int,
        nowait: bool,
    ) -> int:
        # Every read of a view comes through this loop. It returns how far it got: to the end, or
        # with `nowait` to the first segment that is not in memory.
        for start, stop, number in self._map.window(offset + done, offset + len(buffer)):
            part = buffer[start - offset : stop - offset]
            if number is None:
                number = HOLE
                _clear(part)
            else:
                try:
                    self.layers[number].read_into(part, start, nowait=nowait)
                except OSError as error:
                    if nowait and error.errno in _MISSES:
                        return start - offset
                    raise
            supplied[number] = supplied.get(number, 0) + stop - start
        return len(buffer)

    def check_unchanged(self) -> None:
        """Compare every layer with its fingerprint; raises LayerChangedError."""
        for layer in self.layers:
            layer.check_unchanged()

    def data_extents(self) -> ExtentList:
        """The ranges that some layer supplies, adjacent ones joined. Touches no file."""
        return ExtentList((s.start, s.stop) for s in self.segments() if s.layer is not None)

    def visible_bytes(self) -> list[int]:
        """For each layer, how many bytes of the view it supplies."""
        return self._map.owned_bytes(len(self.layers))


def _merged(layers: tuple[Layer, ...]) -> SegmentMap:
    # Extends the merge of the longest lower part of the chain that an open view has, if less than a
    # quarter of the extents is above it; a new merge takes a third of the time per extent. So
    # opening every snapshot of a chain takes time in proportion to its length, not its square.
    extents = [layer.extents for layer in layers]
    total, above = sum(map(len, extents)), 0
    for depth in range(len(layers), 0, -1):
        known = _MAPS.get(layers[:depth])
        if known is not None:
            for number in range(depth, len(layers)):
                known = known.under(extents[number], number)
            break
        above += len(extents[depth - 1])
        if above * 4 > total:
            break
    if known is None:
        known = SegmentMap(extents)
    _MAPS[layers] = known
    return known


# The maps that open views use: an entry disappears with its map.
_MAPS: weakref.WeakValueDictionary[tuple[Layer, ...], SegmentMap]
_MAPS = weakref.WeakValueDictionary()


def _clear(part: memoryview) -> None:
    # The buffer may hold the bytes of an earlier read.
    for start in range(0, len(part), BLOCK):
        part[start : start + BLOCK] = ZEROS[: len(part) - start]


def require_equal_size(path: str, size: int, other_path: str, other_size: int) -> None:
    """Raise SizeMismatchError unless both layers have the same logical size (law 3)."""
    if size != other_size:
        raise SizeMismatchError(
            f"{other_path}: {other_size} bytes, but {path} has {size};"
            " all layers of a chain must have the same size, none is extended or cut"
        )
