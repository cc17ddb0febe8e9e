"""The runtime's ceiling: a pyfuse3 server that answers every read with the same bytes.

``python -m tests.bench.constant SIZE MOUNTPOINT`` shows MOUNTPOINT/image, of so many zero bytes.
"""

from __future__ import annotations

import errno
import stat
import sys

import pyfuse3
import trio

_INODE = 2
_FOREVER = 86400


class _Constant(pyfuse3.Operations):
    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._answer = memoryview(bytes(1 << 20))

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        is_file = inode == _INODE
        entry.st_mode = stat.S_IFREG | 0o444 if is_file else stat.S_IFDIR | 0o755
        entry.st_size = self._size if is_file else 0
        entry.st_blocks = entry.st_size // 512
        entry.attr_timeout = entry.entry_timeout = _FOREVER
        return entry

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name != b"image":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(_INODE)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> memoryview:  # type: ignore[override]
        return self._answer[: min(size, self._size - off)]  # pyfuse3 takes any buffer


def main(size: int, mountpoint: str) -> None:
    pyfuse3.init(_Constant(size), mountpoint, {"fsname=constant", "subtype=constant", "ro"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
