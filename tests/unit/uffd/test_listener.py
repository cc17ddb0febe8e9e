"""The socket at a path, and the one that tells the status."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from diffmergefs.core.errors import FileAccessError, OutputRefusedError
from diffmergefs.uffd.listener import Listener, Owner, asked, status_listener, status_sockets


def test_it_is_there_with_its_mode_and_only_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        listener = Listener(str(tmp_path / "socket"))
    finally:
        os.umask(before)
    with listener.socket, socket.socket(socket.AF_UNIX) as client:
        assert [path.name for path in tmp_path.iterdir()] == ["socket"]
        assert stat.S_IMODE((tmp_path / "socket").stat().st_mode) == 0o600
        client.connect(str(tmp_path / "socket"))
        listener.socket.accept()[0].close()
        listener.close()
        assert list(tmp_path.iterdir()) == []


def test_an_owner_gets_it(tmp_path: Path) -> None:
    owner = Owner(os.geteuid(), os.getegid())
    listener = Listener(str(tmp_path / "socket"), owner)
    with listener.socket:
        status = (tmp_path / "socket").stat()
        assert (status.st_uid, status.st_gid) == owner
        assert stat.S_IMODE(status.st_mode) == 0o660
        # What the check of the socket itself needed is gone.
        listener.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.socket.accept()


def test_a_socket_that_took_its_place_is_left(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = Listener(str(path))
    path.unlink()
    other = Listener(str(path))
    listener.socket.close()
    listener.close()
    assert path.exists()
    with other.socket, pytest.raises(OutputRefusedError, match="a server answers there"):
        Listener(str(path))


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_socket_of_another_kind_is_in_use(tmp_path: Path, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(tmp_path / "socket"))
        with pytest.raises(OutputRefusedError, match="a server answers there"):
            Listener(str(tmp_path / "socket"))


def test_symlinks_and_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OutputRefusedError, match="is no socket"):
        Listener(str(tmp_path / "link"))
    with pytest.raises(FileAccessError, match="No such file"):
        Listener(str(tmp_path / "none" / "socket"))
    with pytest.raises(FileAccessError, match="a directory"):
        Listener(f"{tmp_path}/")


def test_the_path_may_be_long_but_not_the_name(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    listener = Listener(str(folder / ("n" * 80)))
    listener.socket.close()
    listener.close()
    with pytest.raises(FileAccessError, match="longer than 80 bytes"):
        Listener(str(folder / ("n" * 81)))


def test_a_status_socket_is_found_and_answers() -> None:
    before = status_sockets()
    with status_listener() as listening:
        (name,) = set(status_sockets()) - set(before)
        assert f"/{os.getpid()}-" in name

        def answer() -> None:
            for text in (b"all is well", b""):
                connection, _ = listening.accept()
                with connection:
                    assert connection.recv(64) == b"status.json\n"
                    connection.sendall(text)

        thread = threading.Thread(target=answer)
        thread.start()
        assert asked(name, "status.json", 30) == (os.geteuid(), b"all is well")
        with pytest.raises(PermissionError):
            asked(name, "status.json", 30)
        thread.join()
        with pytest.raises(TimeoutError):
            asked(name, "status.json", 0.1)
    assert name not in status_sockets()
