"""The line between a server and its keeper: messages, and descriptors that the keeper holds."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffmergefs.system.board import Board, Mark

READY, HOLD, DROP, TELL, END, SIGNAL, CLEAR = b"RHDTESC"
NUMBER, MARK = struct.Struct("<Q"), struct.Struct("<4Q")
_LONGEST = 1 << 16
_MOST_DESCRIPTORS = 16


@dataclass(kw_only=True, eq=False)
class Line:
    """A server's line to its keeper. Safe for several threads, except `drop`.

    `number` counts the servers from 1. `signals` are those that the keeper got before this server
    began. `held` are the descriptors that it holds, by their number. `suspects` are the marks of
    requests that were in hand at a death and were not answered since; those that are `poisoned` are
    to be refused until that monotonic time. `reason` says how the last server ended, and `dump`
    what its threads did, if it crashed. `keeper` is the keeper's process: make a line there, before
    the fork.
    """

    number: int
    signals: Sequence[int]
    held: Mapping[int, Sequence[int]]
    suspects: frozenset[Mark]
    poisoned: Mapping[Mark, float]
    reason: str
    dump: str
    board: Board
    end: socket.socket

    def __post_init__(self) -> None:
        self.keeper = os.getpid()
        self._numbers = itertools.count(self.number << 32 | 1)
        self._unsent: list[int] = []

    def fileno(self) -> int:
        """The descriptor on which the keeper's messages come."""
        return self.end.fileno()

    @property
    def is_held(self) -> bool:
        """Whether the keeper lives."""
        return os.getppid() == self.keeper

    def ready(self) -> None:
        """Tell the keeper that this server answers requests."""
        self._send(bytes([READY]))

    def tell(self, text: str) -> None:
        """Have the keeper send this to the service manager."""
        self._send(bytes([TELL]) + text.encode())

    def hold(self, *fds: int) -> int:
        """Have the keeper hold these descriptors too; the number to `drop` them by.

        The keeper has them when this returns, even if this process dies at once. Never blocks.
        Raises OSError if the keeper does not take them now. If it is gone, nothing is held.
        """
        number = next(self._numbers)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            message = bytes([HOLD]) + NUMBER.pack(number)
            rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds)
            self.end.sendmsg([message], [rights], socket.MSG_DONTWAIT)
        return number

    def drop(self, number: int) -> None:
        """Have the keeper close what it holds by this number. Never blocks."""
        self._unsent.append(number)
        while self._unsent:
            message = bytes([DROP]) + NUMBER.pack(self._unsent[0])
            try:
                self.end.send(message, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return  # the next call tries again
            except OSError:
                pass
            self._unsent.pop(0)

    def clear(self, mark: Mark) -> None:
        """Tell the keeper that a request of a suspect's mark was answered."""
        self._send(bytes([CLEAR]) + MARK.pack(*mark))

    def last_word(self, word: bytes) -> None:
        """Tell the keeper that this server ends because the mount has ended."""
        self._send(bytes([END]) + word)

    def received(self) -> int | None:
        """The next signal that the keeper passes on; None if it is gone. Never blocks.

        Raises BlockingIOError if there is none.
        """
        try:
            message = self.end.recv(_LONGEST, socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise
        except OSError:
            return None
        return message[1] if message else None

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # the keeper is gone
            self.end.send(message)


def received(end: socket.socket) -> tuple[bytes, list[int]]:
    """The next message on the keeper's `end`, and the descriptors with it. Never blocks.

    There may be fewer descriptors than were sent, if this process can have no more. The message is
    empty at the end of the line. Raises BlockingIOError if there is none. (recv_fds of the standard
    library ignores its flags.)
    """
    fds = array("i")
    room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * fds.itemsize)
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    message, ancillary, _, _ = end.recvmsg(_LONGEST, room, flags)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return message, list(fds)
