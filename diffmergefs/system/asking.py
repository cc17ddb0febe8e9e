"""A question to a filesystem whose server may hang, asked so that nobody hangs with it."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Callable
from typing import NoReturn

from diffmergefs.system.daemon import close_all_but

#: How long a mount of ours may take for an answer that takes no storage.
SECONDS = 5.0
_NUMBER = 4


def ask(question: Callable[[], bytes], seconds: float = SECONDS) -> bytes:
    """What `question()` gives, or the OSError that it raises, from a child process.

    Raises TimeoutError if there is no answer after so many seconds. Who waits for a server that
    has read his request cannot even be killed: the child is then left behind, without any of our
    descriptors.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(question, writer)
    os.close(writer)
    try:
        said = _read_all(reader, time.monotonic() + seconds)
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
    os.waitpid(child, 0)
    if len(said) < _NUMBER:
        raise OSError(errno.EIO, "the child that asked has died")
    if number := int.from_bytes(said[:_NUMBER]):
        raise OSError(number, os.strerror(number))
    return said[_NUMBER:]


def _answer(question: Callable[[], bytes], writer: int) -> NoReturn:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        close_all_but([writer])
        try:
            said = bytes(_NUMBER) + question()
        except OSError as error:
            said = (error.errno or errno.EIO).to_bytes(_NUMBER)
        with open(writer, "wb") as out:
            out.write(said)
    finally:
        os._exit(0)


def _read_all(reader: int, deadline: float) -> bytes:
    said = b""
    while True:
        left = deadline - time.monotonic()
        if not select.select([reader], [], [], max(0.0, left))[0]:
            raise TimeoutError("no answer")
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            return said
        said += chunk


def is_connected(path: str) -> bool:
    """Whether what is mounted on `path` has a server still.

    Raises TimeoutError if it has one that does not answer.
    """

    def question() -> bytes:
        os.statvfs(path)  # a stat may be answered from the kernel's memory
        return b""

    try:
        ask(question)
    except TimeoutError:
        raise
    except OSError as error:
        return error.errno not in (errno.ENOTCONN, errno.ECONNABORTED)
    return True
