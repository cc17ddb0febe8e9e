"""Who is told of the opens and reads of memory files: the adapter's side of record and prefetch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from diffmergefs.fuse.served import OpenImage


class Caller(Protocol):
    """Who asks: of a request's context, the process."""

    @property
    def pid(self) -> int: ...


class OpenWatch(Protocol):
    """Told in the event loop, where nothing may block, of what happens to memory files.

    `file` is the number of an open file, never used twice. `pushed_bytes` counts what was brought
    into the page cache so far, and `hit_bytes` what of it nobody had to ask for: see `Prefetcher`.
    """

    pushed_bytes: int
    hit_bytes: int

    def opened(
        self, file: int, inode: int, shown: OpenImage, caller: Caller, *, writing: bool
    ) -> bool:
        """A file of the image was opened; False if the kernel is to drop the pages it has of it."""
        ...

    def read(self, file: int, offset: int, length: int) -> None:
        """A request came for this range."""
        ...

    def closed(self, file: int) -> Callable[[], object] | None:
        """The file was closed; what is left to do for it, which may block, if anything is."""
        ...

    def stop(self, seconds: float) -> bool:
        """End all work; blocks until that is done, or for about so long. Whether it is done."""
        ...


class Unwatched:
    """An `OpenWatch` that does nothing."""

    pushed_bytes = hit_bytes = 0

    def opened(
        self, file: int, inode: int, shown: OpenImage, caller: Caller, *, writing: bool
    ) -> bool:
        return True

    def read(self, file: int, offset: int, length: int) -> None:
        pass

    def closed(self, file: int) -> Callable[[], object] | None:
        return None

    def stop(self, seconds: float) -> bool:
        return True
