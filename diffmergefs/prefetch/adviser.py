"""The way of `mount --prefetch=fadvise`: a child process asks the kernel to read ahead."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Generator, Sequence

from diffmergefs.core import interpreter
from diffmergefs.core.errors import FileAccessError
from diffmergefs.core.extents import Extent
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.prefetch import advise
from diffmergefs.prefetch.prefetcher import Push

_POLL_SECONDS = 0.02


class Adviser:
    """A `prefetch.Way`: posix_fadvise(WILLNEED) on the mounted file, by a child process.

    `device` is the mount's st_dev, and `path_of` says where an image is to be found in the mount,
    None if it is not any more. The child runs as the daemon does, so it may look into the mount;
    its own open of the file counts for nothing. Nothing is brought where the mount was detached or
    another file stands at the path.
    """

    def __init__(self, device: int, path_of: Callable[[OpenImage], str | None]) -> None:
        self._device = device
        self._path_of = path_of
        self._children: set[int] = set()

    def is_own(self, pid: int) -> bool:
        return pid in self._children

    def bring(self, push: Push, wanted: Sequence[Extent]) -> Generator[int, None, None]:
        path = self._path_of(push.shown)
        if path is None:
            raise FileAccessError(f"{push.shown.name}: is not shown any more")
        numbers = (str(self._device), str(push.inode))
        child = interpreter.start(
            advise.__file__, path, *numbers, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        self._children.add(child.pid)
        try:
            assert child.stdin is not None
            # It opens the file only after this.
            with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
                pipe.write(advise.packed(wanted))
            while (status := _ended(child)) is None:
                yield 0
            if status != 0:
                raise FileAccessError(
                    f"{path}: stands there no more (the child's status: {status})"
                )
            yield sum(stop - start for start, stop in wanted)
        finally:
            child.kill()
            child.wait()
            self._children.discard(child.pid)


def _ended(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None
