"""The first message of a VMM: its regions, and the userfaultfd of its memory."""

from __future__ import annotations

import array
import os
import socket
import time
from contextlib import suppress

from diffmergefs.uffd.regions import Region, parsed, require_fit
from diffmergefs.uffd.userfault import Userfault

#: How long a VMM may take for it.
SECONDS = 10.0
_MOST_BYTES = 1 << 20
_PART = 1 << 16
_MOST_FDS = 16


def wait_for_message(connection: socket.socket, seconds: float = SECONDS) -> None:
    """Wait until something came that `received` can read.

    Raises ConnectionAbortedError if the connection ends before, ValueError with one line if nothing
    comes in time, and OSError.
    """
    connection.settimeout(seconds)
    try:
        begun = connection.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        raise ValueError(f"{_lacks(None)} in time ({_seen(b'')})") from None
    if not begun:
        raise ConnectionAbortedError("nothing came")


def received(
    connection: socket.socket, size: int, seconds: float = SECONDS
) -> tuple[list[Region], Userfault]:
    """The regions, which fit an image of `size` bytes, and the userfaultfd, once both are there.

    They may come in parts and in any order. Raises ConnectionAbortedError if the connection ends
    and nothing came, ValueError with one line for anything else that is not what a VMM sends, or
    not complete in time, and OSError. Then no descriptor stays open.
    """
    fds: list[int] = []
    try:
        regions = _receive(connection, fds, time.monotonic() + seconds)
        require_fit(regions, size)
        return regions, Userfault(fds[0])
    except BaseException:
        for fd in fds:
            with suppress(OSError):
                os.close(fd)
        raise


def _receive(connection: socket.socket, fds: list[int], deadline: float) -> list[Region]:
    text = b""
    regions = None
    while regions is None or not fds:
        connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        try:
            part, ancillary, flags, _ = connection.recvmsg(
                _PART, socket.CMSG_SPACE(_MOST_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            raise ValueError(f"{_lacks(regions)} in time ({_seen(text)})") from None
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                passed = array.array("i")
                passed.frombytes(data[: len(data) - len(data) % passed.itemsize])
                fds.extend(passed)
        if len(fds) > 1 or flags & socket.MSG_CTRUNC:
            raise ValueError("more than one descriptor came with the regions")
        if not part:
            if not text:
                raise ConnectionAbortedError("nothing came")
            raise ValueError(f"{_lacks(regions)} before the connection ended ({_seen(text)})")
        text += part
        if len(text) > _MOST_BYTES:
            raise ValueError(f"the message has more than {_MOST_BYTES} bytes")
        regions = parsed(text)
    return regions


def _lacks(regions: list[Region] | None) -> str:
    return "no complete array of regions came" if regions is None else "no descriptor came"


def _seen(text: bytes) -> str:
    return f"{len(text)} bytes came, the last are {text[-16:]!r}" if text else "nothing came"
