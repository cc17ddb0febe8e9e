"""The kernel's end of a mount, handed from one server to the next.

The kernel sends one INIT request for each mount, and libfuse serves nothing before it has answered
one. So the keeper reads that request, and each server's libfuse gets it from a socket that stands
in for the device. FUSE_NOTIFY_RESEND (Linux 6.9) then gives the server every request that the one
before took and did not answer.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Collection

from diffmergefs.core.errors import MountFailedError
from diffmergefs.system.board import Board

# linux/fuse.h: fuse_in_header has 40 bytes; in fuse_init_in, flags are at 12 and flags2 at 16.
_FLAGS = struct.Struct("<52xII")
_INIT_EXT = 1 << 30
_HAS_RESEND = 1 << (39 - 32)
_RESEND = struct.pack("<IiQ", 16, 7, 0)  # fuse_out_header with the code FUSE_NOTIFY_RESEND
_MOST = 1 << 20


class Device:
    """The device of the mount that pyfuse3 has just made, of which nothing was read yet.

    `others` are what `open_devices` gave before. It reads the kernel's INIT request. Raises
    MountFailedError if there is no such device.
    """

    def __init__(self, others: Collection[int] = ()) -> None:
        found = open_devices().difference(others)
        if not found:
            raise MountFailedError("/dev/fuse: the mount has no open device")
        self.fd = min(found)
        self._init = os.read(self.fd, _MOST)

    @property
    def resends(self) -> bool:
        """Whether the kernel sends again what a dead server had taken."""
        if len(self._init) < _FLAGS.size:
            return False
        flags, flags2 = _FLAGS.unpack_from(self._init)
        return bool(flags & _INIT_EXT and flags2 & _HAS_RESEND)

    def begin(self, board: Board, *, resend: bool) -> Introduction:
        """Have this process read INIT from the device next, which stands aside until then."""
        return Introduction(self.fd, self._init, board, resend=resend)


class Introduction:
    """The exchange of INIT between libfuse and the keeper's copy. The first answer is the kernel's.

    With `resend`, the kernel is asked for the requests of the server before, once libfuse is ready.
    """

    def __init__(self, fd: int, init: bytes, board: Board, *, resend: bool) -> None:
        self._fd = fd
        self._board = board
        self._resend = resend
        self._device = os.dup(fd)
        self._socket, stand_in = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.dup2(stand_in.fileno(), fd, inheritable=False)
        stand_in.close()
        self._socket.send(init)

    def finish(self) -> None:
        """Put the device back in its place; call it when libfuse has answered INIT."""
        answer = self._socket.recv(_MOST)
        self._socket.close()
        # The kernel refuses a second answer, and every message on a connection that has ended.
        # Then the next read says so.
        with contextlib.suppress(OSError):
            if not self._board["is_known"]:
                os.write(self._device, answer)
        self._board["is_known"] = 1
        os.dup2(self._device, self._fd, inheritable=False)
        os.close(self._device)
        if self._resend:
            with contextlib.suppress(OSError):
                os.write(self._fd, _RESEND)


def open_devices() -> set[int]:
    """The descriptors of this process that are a FUSE device, of whatever mount."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.add(int(name))
    return found
