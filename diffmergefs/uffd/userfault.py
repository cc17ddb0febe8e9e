"""The kernel's userfaultfd(2), as its server sees it: events in, pages out."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct

from diffmergefs.core.errors import os_error

#: What an event is.
PAGEFAULT, FORK, REMAP, REMOVE, UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16
#: A fault of another kind than a page that is not there: write protection, or a minor fault.
OTHER_FAULTS = 0x2 | 0x4

_WAKE = 0x8010AA02
_COPY = 0xC028AA03
_ZEROPAGE = 0xC020AA04

_EVENT = struct.Struct("=BxxxxxxxQQQ")
_AT_ONCE = 16
_COPY_ARGUMENT = struct.Struct("=QQQQq")
_ZERO_ARGUMENT = struct.Struct("=QQQq")
_RANGE = struct.Struct("=QQ")
_LINK = "anon_inode:[userfaultfd]"


#: What happened to the memory: its kind, and three numbers that depend on it. PAGEFAULT: flags, and
#: the address. REMOVE and UNMAP: start and end of the range.
Event = tuple[int, int, int, int]


class Pending(Exception):
    """The kernel puts no page in place while an event waits to be read."""


class Userfault:
    """A userfaultfd that another process made and registered. Use it from one thread only.

    Takes over `fd`, and makes it non-blocking. Raises ValueError if it is not a userfaultfd.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        if os.readlink(f"/proc/self/fd/{fd}") != _LINK:
            raise ValueError("the descriptor that came with the regions is not a userfaultfd")
        os.set_blocking(fd, False)
        self._copy_argument = bytearray(_COPY_ARGUMENT.size)

    def close(self) -> None:
        """Close the descriptor. The other process keeps its own, and waits for pages for ever."""
        os.close(self.fd)

    def events(self) -> list[Event]:
        """The events that wait, at most 16; none if there are none. Raises OSError."""
        try:
            data = os.read(self.fd, _AT_ONCE * _EVENT.size)
        except BlockingIOError:
            return []
        return list(_EVENT.iter_unpack(data))

    def copy(self, target: int, source: int, length: int) -> int:
        """Copy pages from our address `source` to `target` in the other process, and wake it there.

        Returns how many bytes were copied, which is less than `length` if a page was there
        already. Raises Pending if nothing was copied because of an event, and OSError: ESRCH if
        the process has ended, ENOENT if its memory is not mapped or registered there any more.
        """
        argument = self._copy_argument
        _COPY_ARGUMENT.pack_into(argument, 0, target, source, length, 0, 0)
        return self._put(_COPY, argument, length)

    def zero(self, target: int, length: int) -> int:
        """As `copy`, but with zeros. Raises OSError (EINVAL) where the kind of memory has none."""
        return self._put(_ZEROPAGE, bytearray(_ZERO_ARGUMENT.pack(target, length, 0, 0)), length)

    def wake(self, target: int, length: int) -> None:
        """Wake whoever waits for these pages, which are there. Raises OSError."""
        fcntl.ioctl(self.fd, _WAKE, _RANGE.pack(target, length))

    def _put(self, request: int, argument: bytearray, length: int) -> int:
        try:
            fcntl.ioctl(self.fd, request, argument)
        except BlockingIOError:
            # EAGAIN has two meanings, which the last field tells apart.
            done: int = struct.unpack_from("=q", argument, len(argument) - 8)[0]
            if done > 0:
                return done
            if done == -errno.EAGAIN:
                raise Pending from None
            raise os_error(-done if done else errno.EAGAIN) from None
        except FileExistsError:
            return 0
        return length


class Room:
    """Page-aligned memory of our own, from which pages are copied; `buffer` is all of it."""

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size)
        self.buffer = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
