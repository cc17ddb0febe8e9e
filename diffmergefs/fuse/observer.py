"""The interface of an observer: what the mount reports to it, and what it may use of the mount."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffmergefs.fuse.nodes import OpenImage


@dataclass(frozen=True)
class ObservedMount:
    """What an observer may use of the mount that it observes.

    `device` is the device number of the mount (`major:minor`), or None if the mount table cannot
    be read. `path_of` returns the path of an image in the mount, or None if the mount no longer
    shows it. `store_pages(inode, offset, data)` puts data into the page cache of a mounted file. It
    waits for pages that a client is waiting for, so never call it in the event loop.
    `run_in_main_thread` runs a function in the event loop, which is the main thread, and waits for
    it. It raises OSError if the mount is ending.
    """

    device: str | None
    path_of: Callable[[OpenImage], str | None]
    store_pages: Callable[[int, int, bytes], None]
    run_in_main_thread: Callable[[Callable[[], None]], None]


class Observer:
    """Receives the events of memory files: opens, reads and closes. This one does nothing.

    The methods are called in the event loop and must not block, except `stop` and `close`. `file`
    is the number of an open file and is never reused. `pushed_bytes` counts the bytes that were
    prefetched into the page cache, and `hit_bytes` those of them that no reader had to request: see
    `Prefetcher`.
    """

    pushed_bytes = hit_bytes = 0

    def opened(self, file: int, inode: int, image: OpenImage, pid: int, *, writing: bool) -> bool:
        """The process `pid` opened a file of the image.

        Return False to have the kernel drop its cached pages.
        """
        return True

    def read(self, file: int, offset: int, length: int) -> None:
        """A read of this range was requested."""

    def closed(self, file: int) -> Callable[[], object] | None:
        """The file was closed. Return the work that remains, which may block, or None."""
        return None

    def stop(self, seconds: float) -> bool:
        """End all work, and return whether it ended. Blocks for a small multiple of `seconds`.

        Safe to call again, and from any thread.
        """
        return True

    def ready(self, readahead_kib: int | None) -> None:
        """The mount answers requests. The kernel reads ahead this much (None: unknown)."""

    def close(self) -> None:
        """Release what the observer holds of the mount. Called once, after `stop`."""
