"""Who connects to a page server: whether it may read the image, and how to end it."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffmergefs.core import beneath
from diffmergefs.core.identity import file_bits
from diffmergefs.core.layer import Layer
from diffmergefs.fuse.access import Access, lineage, require_same

_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77  # since Linux 6.5
_CREDENTIALS = struct.Struct("=iII")
_MOST_GROUPS = 256
_READ, _SEARCH = 0o4, 0o1


@dataclass(frozen=True)
class Peer:
    """The process that connected, as the kernel knew it then: its numbers, not its claims."""

    pid: int
    uid: int
    groups: frozenset[int]

    @classmethod
    def of(cls, connection: socket.socket) -> Peer:
        """The other end of a Unix socket. Raises OSError, if it has more than 256 groups too."""
        packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, gid = _CREDENTIALS.unpack(packed)
        more = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
        return cls(pid, uid, frozenset((gid, *struct.unpack(f"={len(more) // 4}I", more))))

    def open_pidfd(self, connection: socket.socket) -> int:
        """A descriptor of the process, which becomes readable at its end. Raises OSError."""
        try:
            packed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
        except OSError:
            return os.pidfd_open(self.pid)
        fd: int = struct.unpack("=i", packed)[0]
        return fd

    def __str__(self) -> str:
        return f"process {self.pid} of user {self.uid}"

    def has(self, need: int, access: Access) -> bool:
        """Whether the permission bits `access` grant it `need` (4 to read, 1 to search)."""
        if self.uid == 0:
            return True
        if self.uid == access.uid:
            return access.mode >> 6 & need == need
        if access.gid in self.groups:
            return access.mode >> 3 & need == need
        return access.mode & need == need


def may_end(pidfd: int) -> bool:
    """Whether this process may kill that one."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except PermissionError:
        return False
    except ProcessLookupError:
        pass
    return True


def has_ended(pidfd: int) -> bool:
    """Whether the process has ended."""
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    return bool(ended.poll(0))


def unreadable(layers: Sequence[Layer], peer: Peer) -> str | None:
    """The path of a layer that the peer may not read by itself, or None if it may read all.

    The open files and the directories above them are judged, by owner, group and mode. Of a file or
    directory with an ACL only the owner's bits count, and a deleted file is its owner's. Raises
    OSError, ESTALE if a path leads to another file now.
    """
    for layer in layers:
        status = os.fstat(layer.fd)
        mode = file_bits(layer.fd, status.st_mode)
        if status.st_nlink == 0:
            mode &= 0o700
        if not peer.has(_READ, Access(status.st_uid, status.st_gid, mode)):
            return layer.path
        if status.st_nlink and not all(peer.has(_SEARCH, each) for each in _above(layer, status)):
            return layer.path
    return None


def _above(layer: Layer, known: os.stat_result) -> Iterable[Access]:
    folder, name = os.path.split(os.readlink(f"/proc/self/fd/{layer.fd}"))
    with beneath.passing(None, folder) as fd:
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        require_same(found, known.st_dev, known.st_ino, layer.path)
        return lineage(fd)
