"""Notifications to a service manager, over real datagram sockets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.system.sdnotify import Notifier, is_journal
from tests.support.subjects.sdnotify import Manager, manager

__all__ = ["manager"]


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
