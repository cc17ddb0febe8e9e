"""Notifications to a service manager, over real datagram sockets, and which process sends them."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmergefs.system.sdnotify import Notifier, is_journal
from tests.support import mounttable
from tests.support.commands import diffmergefs
from tests.support.images import PAGE, signed
from tests.support.live import held, until
from tests.support.mounts import mounted
from tests.support.stores import write_chain


class Manager:
    """The socket on which a service manager listens, and all that came so far."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1) if address[0] == "@" else address)
        self._socket.setblocking(False)

    def heard(self) -> list[str]:
        """The datagrams, oldest first."""
        try:
            while True:
                self.messages.append(self._socket.recv(4096).decode())
        except BlockingIOError:
            return self.messages

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    path = str(tmp_path / "notify")
    found = Manager(path if request.param == "path" else f"@diffmergefs-test{path}")
    yield found
    found.close()


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


def test_one_datagram_a_call(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    assert notifier
    notifier.notify("READY=1", "STATUS=up")
    notifier.notify("STOPPING=1")
    assert manager.heard() == ["READY=1\nSTATUS=up", "STOPPING=1"]


def test_the_environment_gives_the_address_away(manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": manager.address, "OTHER": "x"}
    Notifier.from_environment(environment).notify("READY=1")
    assert environment == {"OTHER": "x"}
    assert manager.heard() == ["READY=1"]


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}], ids=["unset", "empty"])
def test_without_an_address_nobody_is_notified(
    environment: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier.from_environment(dict(environment))
    assert not notifier
    notifier.notify("READY=1")
    assert not caplog.records


@pytest.mark.parametrize("address", ["vsock:2:1", "relative/path"])
def test_what_is_no_address_is_said_and_not_told(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert not Notifier(address)
    assert f"NOTIFY_SOCKET={address}: neither a path" in caplog.text


def test_what_cannot_be_sent_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Notifier(f"{tmp_path}/nobody").notify("READY=1")
    Notifier(f"{tmp_path}/{'x' * 200}").notify("READY=1")
    assert caplog.text.count("cannot be notified") == 2


def test_a_manager_that_does_not_listen_holds_nobody_up(
    manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier(manager.address)
    full = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 2
    for number in range(full):
        notifier.notify(f"STATUS={number}")
    assert "cannot be notified" in caplog.text
    assert manager.heard()[0] == "STATUS=0"


def test_the_journal_is_known_by_device_and_inode(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as file:
        status = os.fstat(file.fileno())
        assert is_journal(file.fileno(), f"{status.st_dev}:{status.st_ino}")
        assert not is_journal(file.fileno(), f"{status.st_dev}:{status.st_ino + 1}")
        assert not is_journal(file.fileno(), None)
        fd = file.fileno()
    assert not is_journal(fd, f"{status.st_dev}:{status.st_ino}")


def test_a_mount_in_front_tells_its_life(
    store: Path, mountpoint: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root too, who believes nothing else of his environment."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    with mounted(store, mountpoint) as mount:
        until(lambda: "READY=1" in manager.heard(), "it did not say that it is ready")
        with held(mountpoint / "leaf" / "memory.bin") as holder:
            status = "STATUS=serving 2 snapshots, 1 file open"
            until(lambda: status in manager.heard(), "it did not count the open file")
            assert not [line for line in manager.messages if "STOPPING" in line]
            mount.process.send_signal(signal.SIGTERM)
            stopping = "STOPPING=1\nSTATUS=detached; 1 file open, serving until the last is closed"
            until(lambda: stopping in manager.heard(), "it did not say that it stops")
            until(lambda: not mounttable.at(str(mountpoint)), "it was not detached")
            assert holder.read(PAGE, PAGE) == signed(1, PAGE, PAGE)
            assert mount.process.poll() is None
        assert mount.process.wait(20) == 0
    known = ("READY=1", "STOPPING=1\nSTATUS=detached; ", "STATUS=detached; ", "STATUS=serving ")
    assert all(message.startswith(known) for message in manager.heard())
    # Whoever named the socket learns no names.
    assert not [m for m in manager.messages if str(store) in m or "leaf" in m]


def test_a_mount_of_explicit_layers_counts_one_image(
    store: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    with mounted(None, mountpoint, f"--base={store}/base/memory.bin"):
        status = "STATUS=serving one image, 0 files open"
        until(lambda: status in manager.heard(), "it did not say that it serves")
    manager.close()


def test_a_mount_that_fails_does_not_say_that_it_is_ready(
    public_path: Path, mountpoint: Path, tmp_path: Path
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    done = diffmergefs(
        "mount", "-f", public_path / "none", mountpoint, NOTIFY_SOCKET=manager.address
    )
    assert done.returncode == 14
    assert manager.heard() == []
    manager.close()


def test_a_mount_in_the_background_tells_nobody(
    store: Path, mountpoint: Path, tmp_path: Path
) -> None:
    """The command's own end says that it is ready; the daemon has no such variable."""
    manager = Manager(str(tmp_path / "notify"))
    done = diffmergefs("mount", "--log=/dev/null", store, mountpoint, NOTIFY_SOCKET=manager.address)
    try:
        assert done.returncode == 0, done
    finally:
        assert diffmergefs("umount", mountpoint).returncode == 0
    assert manager.heard() == []
    manager.close()
