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
from collections.abc import Callable, Mapping, Sequence
from typing import IO, NoReturn

from diffmergefs.core.errors import os_error
from diffmergefs.system.daemon import close_all_but

#: Where root looks for helper programs, since another user may have set the PATH.
ROOTS_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
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
    (answer,) = ask_all([question], seconds)
    if isinstance(answer, OSError):
        raise answer
    return answer


def ask_all(
    questions: Sequence[Callable[[], bytes]], seconds: float = ANSWER_SECONDS
) -> list[bytes | OSError]:
    """What `ask` returns or raises for each question. All are asked at once, in `seconds`."""
    children: dict[int, _Child] = {}
    for question in questions:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _answer(question, writer)
        os.close(writer)
        children[reader] = _Child(child)
    _collect(children, time.monotonic() + seconds)
    return [child.answer() for child in children.values()]


class _Child:
    # A child process, and what it has sent so far. `answer` ends it.

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.received = b""
        self.done = False

    def answer(self) -> bytes | OSError:
        if not self.done:
            os.kill(self._pid, signal.SIGKILL)
            return TimeoutError("no answer")
        os.waitpid(self._pid, 0)
        if len(self.received) < _ERRNO_BYTES:
            return OSError(errno.EIO, "the child process died before it answered")
        if number := int.from_bytes(self.received[:_ERRNO_BYTES]):
            return os_error(number)
        return self.received[_ERRNO_BYTES:]


def _collect(children: dict[int, _Child], deadline: float) -> None:
    # Read from the descriptors until each child has closed its end, or until the deadline.
    pending = select.poll()
    for reader in children:
        pending.register(reader, select.POLLIN)
    left = len(children)
    while left and (ready := pending.poll(max(0.0, deadline - time.monotonic()) * 1000)):
        for reader, _ in ready:
            chunk = os.read(reader, 1 << 16)
            children[reader].received += chunk
            if not chunk:
                children[reader].done = True
                pending.unregister(reader)
                left -= 1
    for reader in children:
        os.close(reader)


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
