"""The merged view of a chain: one plan, `segments`, and exact reads by it."""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterator, Sequence
from types import TracebackType

from diffmergefs.errors import BrokenChainError, SizeMismatchError
from diffmergefs.extents import MAX_LAYERS, Segment, SegmentMap
from diffmergefs.layer import Layer


class MergedView:
    """A chain of open layers as one complete, read-only image of `size` bytes.

    `layers` are base first, 1 to 1,000, all of the same size; their extents are taken as trusted
    (`diffmergefs.trust`). Nothing is copied and no layer is ever written. Safe to use from several
    threads. As a context manager it closes its layers.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        """Raises SizeMismatchError, naming both files and both sizes."""
        if not 1 <= len(layers) <= MAX_LAYERS:
            raise BrokenChainError(f"a chain of {len(layers)} layers; 1 to {MAX_LAYERS} can be")
        for layer in layers[1:]:
            require_equal_size(layers[0].path, layers[0].size, layer.path, layer.size)
        self.layers = tuple(layers)
        self.size = layers[0].size

    @functools.cached_property
    def _map(self) -> SegmentMap:
        # Merged at the first use, so that who only judges a chain does not pay for it.
        return SegmentMap([layer.extents for layer in self.layers])

    def __enter__(self) -> MergedView:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the layers, also for other views that share them."""
        for layer in self.layers:
            layer.close()

    def segments(self, offset: int = 0, length: int | None = None) -> Iterator[Segment]:
        """Who supplies `[offset, offset + length)`, clipped to the image; by default all of it.

        The segments tile the window exactly: sorted, never empty, neighbours of one layer joined,
        a hole in every layer as a segment of layer None. No file is touched. Raises ValueError for
        a negative offset or length.
        """
        if offset < 0 or (length is not None and length < 0):
            raise ValueError(f"negative window: offset {offset}, length {length}")
        stop = self.size if length is None else min(offset + length, self.size)
        return self._map.window(offset, stop)

    def read(self, offset: int, length: int) -> bytearray:
        """The bytes of `[offset, offset + length)`, fewer only where the image ends.

        Each layer is asked for just the bytes that it supplies; every layer that was asked is then
        compared with its fingerprint (law 6). Raises LayerChangedError, OSError; never returns
        short or mixed bytes. May block.
        """
        data, asked = self._gather(offset, length, nowait=False)
        for layer in asked:
            layer.settle()
        return data

    def read_nowait(self, offset: int, length: int) -> bytearray | None:
        """Like `read`, but None wherever it would block: then call `read`, in a thread."""
        try:
            data, asked = self._gather(offset, length, nowait=True)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return None
            raise
        return data if all(layer.is_settled() for layer in asked) else None

    def _gather(self, offset: int, length: int, *, nowait: bool) -> tuple[bytearray, set[Layer]]:
        data = bytearray(max(0, min(length, self.size - offset)))
        window = memoryview(data)
        asked = set()
        for start, stop, number in self.segments(offset, length):
            if number is not None:
                layer = self.layers[number]
                layer.read_into(window[start - offset : stop - offset], start, nowait=nowait)
                asked.add(layer)
        return data, asked

    def settle(self) -> None:
        """Compare every layer with its fingerprint; raises LayerChangedError."""
        for layer in self.layers:
            layer.settle()

    def visible_bytes(self) -> list[int]:
        """For each layer, how many bytes of the view it supplies."""
        visible = [0] * len(self.layers)
        for start, stop, number in self._map:
            assert number is not None
            visible[number] += stop - start
        return visible


def require_equal_size(path: str, size: int, other_path: str, other_size: int) -> None:
    """Raise SizeMismatchError unless both layers have the same logical size (law 3)."""
    if size != other_size:
        raise SizeMismatchError(
            f"{other_path}: {other_size} bytes, but {path} has {size};"
            " all layers of a chain have the same size, none is extended or cut"
        )
