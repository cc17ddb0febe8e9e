"""The child of `mount --prefetch=fadvise`: has the kernel read ranges of one file of the mount.

Run as a program, by its path: PATH DEVICE INODE, and on stdin the ranges, each as two native
unsigned 64-bit integers, start and stop. A process of its own, because a daemon that looks into
its own mount hangs. It opens nothing before stdin has ended.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterable

#: The exit status where another file stands at the path.
ANOTHER = 3

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def packed(ranges: Iterable[tuple[int, int]]) -> bytes:
    """The ranges as they are written to stdin."""
    return array("Q", [border for pair in ranges for border in pair]).tobytes()


def advise(path: str, device: int, inode: int, borders: bytes) -> int:
    """Ask for the ranges, if the file of this device and inode stands at the path; the status.

    What the kernel then reads it reads on its own, whether or not this process is still there.
    Raises OSError.
    """
    fd = os.open(path, _FLAGS)
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != (device, inode):
            return ANOTHER
        numbers = array("Q", borders)
        for start, stop in zip(numbers[::2], numbers[1::2], strict=True):
            os.posix_fadvise(fd, start, stop - start, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)
    return 0


if __name__ == "__main__":
    wanted = sys.stdin.buffer.read()
    sys.exit(advise(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), wanted))
