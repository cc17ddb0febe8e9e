"""The sockets of a page server: one for VMMs, at a path, and one that tells its status."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
import threading
from contextlib import suppress
from typing import NamedTuple

from diffmergefs.core.errors import FileAccessError, OutputRefusedError
from diffmergefs.core.failures import failures
from diffmergefs.uffd.peer import Peer

_BACKLOG = 4096
# Of an address of 107 bytes, /proc/self/fd/N/ takes the rest.
_LONGEST = 80
_UNIX = "/proc/net/unix"
_PREFIX = "diffmergefs-uffd/"


class Owner(NamedTuple):
    """A user, and a group or None, that a socket is for."""

    uid: int
    gid: int | None


class Listener:
    """A listening Unix stream socket at `path`, from its first moment on as it is to be.

    Its mode is 0600, or 0660 with an owner that has a group. A socket at the path that nobody
    serves any more is replaced. The path may be longer than the 107 bytes of an address. Raises
    OutputRefusedError if something else is there, FileAccessError.
    """

    def __init__(self, path: str, owner: Owner | None = None) -> None:
        self.path = path
        self._closing = threading.Lock()
        self._is_closed = False
        folder, self._name = os.path.split(path)
        if not self._name:
            raise FileAccessError(f"{path}: a directory; name the socket in it")
        if len(os.fsencode(self._name)) > _LONGEST:
            raise FileAccessError(f"{path}: its name is longer than {_LONGEST} bytes")
        with failures(path):
            self._folder = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY)
            try:
                self._known = self._open(owner)
            except BaseException:
                os.close(self._folder)
                raise

    def _open(self, owner: Owner | None) -> tuple[int, int]:
        self._remove_stale()
        name = f".diffmergefs-{secrets.token_hex(8)}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o117 if owner and owner.gid is not None else 0o177)
        try:
            self.socket.bind(self._address(name))
        except BaseException:
            self.socket.close()
            raise
        finally:
            os.umask(before)
        try:
            self.socket.listen(_BACKLOG)
            known = self._give(name, owner)
            try:
                os.link(name, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            except FileExistsError:
                raise self._in_use() from None
            return known
        except BaseException:
            self.socket.close()
            raise
        finally:
            os.unlink(name, dir_fd=self._folder)

    def _address(self, name: str) -> str:
        return f"/proc/self/fd/{self._folder}/{name}"

    def _in_use(self) -> OutputRefusedError:
        return OutputRefusedError(
            f"{self.path}: a server answers there; choose another socket, or stop that server"
        )

    def _remove_stale(self) -> None:
        try:
            mode = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise OutputRefusedError(
                f"{self.path}: exists and is no socket; choose another path, or remove it"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.setblocking(False)
            try:
                client.connect(self._address(self._name))
            except ConnectionRefusedError:
                os.unlink(self._name, dir_fd=self._folder)
                return
            except BlockingIOError:
                pass  # its queue is full
            except OSError as error:
                if error.errno != errno.EPROTOTYPE:
                    raise
        raise self._in_use()

    def _give(self, name: str, owner: Owner | None) -> tuple[int, int]:
        # The directory may be another user's, who may put another file at the name before its
        # owner is changed. So what is opened there counts, once it is known to be this socket.
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._folder)
        try:
            status = os.fstat(fd)
            if owner is not None:
                self._require_own(fd, name)
                gid = -1 if owner.gid is None else owner.gid
                os.chown(f"/proc/self/fd/{fd}", owner.uid, gid)
            return status.st_dev, status.st_ino
        finally:
            os.close(fd)

    def _require_own(self, fd: int, name: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(f"/proc/self/fd/{fd}")
            accepted, _ = self.socket.accept()
            with accepted:
                # Whoever is connected through it would get the byte, and not this client.
                accepted.send(b"1")
                client.settimeout(1)
                if client.recv(1) != b"1":
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)

    def close(self) -> None:
        """Remove the socket from its path, unless another one is there. It still accepts.

        Safe for several threads, and more than once.
        """
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            with suppress(OSError):
                now = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
                if (now.st_dev, now.st_ino) == self._known:
                    os.unlink(self._name, dir_fd=self._folder)
            os.close(self._folder)


def status_listener() -> socket.socket:
    """A listening socket with a name that `status_sockets` finds, without a path."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The process has one; the rest keeps others from taking the name first.
    name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    listening.bind(b"\0" + name.encode())
    listening.listen(16)
    return listening


def status_sockets() -> list[str]:
    """The names of all status sockets in this network namespace, of whatever user."""
    with open(_UNIX, encoding="utf-8", errors="replace") as lines:
        words = (line.split() for line in lines)
        found = {word[-1][1:] for word in words if word[-1].startswith(f"@{_PREFIX}")}
    return sorted(found)


def asked(name: str, what: str, seconds: float) -> tuple[int, bytes]:
    """The answer of the status socket `name` to the line `what`, and the uid of its server.

    Raises OSError: TimeoutError if there is none in time, PermissionError if it has none for us.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(seconds)
        client.connect(b"\0" + name.encode())
        uid = Peer.of(client).uid
        client.sendall(what.encode() + b"\n")
        answer = b""
        while part := client.recv(1 << 16):
            answer += part
    if not answer:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return uid, answer
