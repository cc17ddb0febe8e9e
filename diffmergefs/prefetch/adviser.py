"""The method of `mount --prefetch=fadvise`: a child process asks the kernel to read ahead."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence

if __name__ != "__main__":  # the child runs this file with the standard library alone, in 10 ms
    import contextlib
    import subprocess

    from diffmergefs.core.errors import FileAccessError
    from diffmergefs.core.extents import Extent
    from diffmergefs.fuse.nodes import OpenImage
    from diffmergefs.prefetch.push import Push
    from diffmergefs.system import children

#: The exit status of the child if another file stands at the path.
ANOTHER = 3

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_POLL_SECONDS = 0.02


class Adviser:
    """A `push.Method`: posix_fadvise(WILLNEED) on the mounted file, by a child process.

    A daemon that looks into its own mount hangs, so a child does it. `device` is the st_dev of the
    mount. `path_of` gives the path of an image in the mount, or None if the mount no longer has it.
    The child runs as the user of the daemon, so it may look into the mount. If the mount was
    detached, or another file stands at the path, nothing is read.
    """

    def __init__(self, device: int, path_of: Callable[[OpenImage], str | None]) -> None:
        self._device = device
        self._path_of = path_of
        self._children: set[int] = set()

    def is_own(self, pid: int) -> bool:
        return pid in self._children

    def populate(self, push: Push, wanted: Sequence[Extent]) -> Generator[int, None, None]:
        path = self._path_of(push.image)
        if path is None:
            raise FileAccessError(f"{push.image.name}: the mount no longer has it")
        numbers = (str(self._device), str(push.inode))
        child = children.start(
            __file__, path, *numbers, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        self._children.add(child.pid)
        try:
            assert child.stdin is not None
            # The child opens the file only after this.
            with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
                pipe.write(packed(wanted))
            while (status := _status_of(child)) is None:
                yield 0
            if status != 0:
                raise FileAccessError(
                    f"{path}: is no longer there (the child's exit status: {status})"
                )
            yield sum(stop - start for start, stop in wanted)
        finally:
            child.kill()
            child.wait()
            self._children.discard(child.pid)


def _status_of(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def packed(ranges: Iterable[tuple[int, int]]) -> bytes:
    """The ranges as the child reads them: two native unsigned 64-bit integers each."""
    return array("Q", [border for pair in ranges for border in pair]).tobytes()


def advise(path: str, device: int, inode: int, ranges: bytes) -> int:
    """Advise the kernel of the `packed` ranges, and return the exit status.

    ANOTHER means that a file of another device or inode stands at the path. The kernel reads on its
    own, even after this process has ended. Raises OSError.
    """
    fd = os.open(path, _FLAGS)
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != (device, inode):
            return ANOTHER
        borders = array("Q", ranges)
        for start, stop in zip(borders[::2], borders[1::2], strict=True):
            os.posix_fadvise(fd, start, stop - start, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)
    return 0


if __name__ == "__main__":
    # Arguments: PATH DEVICE INODE. The ranges come on stdin; open nothing before it has ended.
    wanted = sys.stdin.buffer.read()
    sys.exit(advise(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), wanted))
