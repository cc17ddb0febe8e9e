"""Child processes: to ask a filesystem whose server may hang, and to run Python of our own.

Only this module starts an interpreter. A new one imports modules from its current directory and
from where its environment points. If root runs it, someone else may control both (law 9). So each
one starts in /, with an explicit module path.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, NoReturn

from diffmergefs.core.errors import os_error
from diffmergefs.system.daemon import close_all_but

#: How long a mount of ours may take to answer what needs no storage.
ANSWER_SECONDS = 5.0
_ERRNO_BYTES = 4

_Stream = int | IO[bytes]


def ask(question: Callable[[], bytes], seconds: float = ANSWER_SECONDS) -> bytes:
    """The result of `question()`, or the OSError that it raises, from a child process.

    Raises TimeoutError if there is no answer within `seconds`. A process that waits for a server
    which has read its request cannot even be killed: the child is then left behind, without any of
    our descriptors.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(question, writer)
    os.close(writer)
    try:
        answer = _read_all(reader, time.monotonic() + seconds)
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
    os.waitpid(child, 0)
    if len(answer) < _ERRNO_BYTES:
        raise OSError(errno.EIO, "the child process died before it answered")
    if number := int.from_bytes(answer[:_ERRNO_BYTES]):
        raise os_error(number)
    return answer[_ERRNO_BYTES:]


def _answer(question: Callable[[], bytes], writer: int) -> NoReturn:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        close_all_but([writer])
        try:
            answer = bytes(_ERRNO_BYTES) + question()
        except OSError as error:
            answer = (error.errno or errno.EIO).to_bytes(_ERRNO_BYTES)
        with open(writer, "wb") as out:
            out.write(answer)
    finally:
        os._exit(0)


def _read_all(reader: int, deadline: float) -> bytes:
    answer = b""
    while True:
        left = deadline - time.monotonic()
        if not select.select([reader], [], [], max(0.0, left))[0]:
            raise TimeoutError("no answer")
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            return answer
        answer += chunk


def is_connected(path: str) -> bool:
    """Whether the filesystem mounted on `path` still has a server.

    Raises TimeoutError if its server does not answer.
    """

    def question() -> bytes:
        os.statvfs(path)  # the kernel may answer a stat from its cache
        return b""

    try:
        ask(question)
    except TimeoutError:
        raise
    except OSError as error:
        return error.errno not in (errno.ENOTCONN, errno.ECONNABORTED)
    return True


def start(program: str, *arguments: str, stdin: int, stdout: int) -> subprocess.Popen[bytes]:
    """Run a Python file with this interpreter; its stderr is discarded. Raises OSError.

    The program can import only the standard library, whatever the environment and the current
    directory contain. It runs in its own session, so no signal of a terminal reaches it.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", program, *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={},
        start_new_session=True,
    )


def start_code(
    code: str,
    *arguments: str,
    stdout: _Stream = subprocess.DEVNULL,
    stderr: _Stream = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Run Python code with this interpreter, in /; stdin is /dev/null. Raises OSError.

    It can import exactly what the absolute entries of this process's `sys.path` offer. Its
    environment is ours or `env`; as root it ignores Python's variables there.
    """
    known = [entry for entry in sys.path if os.path.isabs(entry)]
    return subprocess.Popen(
        [
            sys.executable,
            "-I" if os.geteuid() == 0 else "-P",
            "-c",
            f"import sys; sys.path[:] = {known!a}; {code}",
            *arguments,
        ],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        cwd="/",
        env=env,
    )
