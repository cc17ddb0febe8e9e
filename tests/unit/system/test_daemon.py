"""A child process in the background, and what its caller learns of its start."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.system import daemon
from diffmergefs.system.daemon import ADDRESS, Notifier, is_journal
from tests.support.live import until
from tests.support.subjects.daemon import Manager, manager

__all__ = ["manager"]


def test_start_tells_how_a_child_went() -> None:
    def says_and_fails(caller: daemon.Caller) -> int:
        os.write(2, b"first\nlast")
        return 9

    def ends_without_a_word(caller: daemon.Caller) -> int:
        return 0

    def is_killed(caller: daemon.Caller) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def never_ready(caller: daemon.Caller) -> int:
        os.write(2, b"so far")
        signal.pause()
        return 0

    def is_ready(caller: daemon.Caller) -> int:
        os.write(2, b"w" * 200_000)
        caller.ready()
        os.write(2, b"never seen")
        return 3

    def leaves(caller: daemon.Caller) -> int:
        os.write(2, b"said")
        caller.leave()
        os.write(2, b"never seen")
        caller.leave()
        return 3

    assert daemon.start(leaves, 30) == (3, "said")
    assert daemon.start(says_and_fails, 30) == (9, "first\nlast")
    assert daemon.start(ends_without_a_word, 30).status not in (0, None)
    assert daemon.start(is_killed, 30) == (-signal.SIGKILL, "")
    assert daemon.start(is_ready, 30) == (0, "w" * 200_000)
    assert daemon.start(never_ready, 0.2) == (None, "so far")


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_an_interrupted_start_ends_its_child(
    ending: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tmp_path / "pid"

    def never_ready(caller: daemon.Caller) -> int:
        known.with_name("new").write_text(str(os.getpid()))
        known.with_name("new").rename(known)
        signal.pause()
        return 0

    def interrupted(*_: object) -> None:
        until(known.exists, "the child did not start")
        raise ending

    monkeypatch.setattr("diffmergefs.system.daemon.select.select", interrupted)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(type(ending)):
        daemon.start(never_ready, 30)
    child = int(known.read_text())
    is_left = Path(f"/proc/{child}").exists()
    if is_left:
        os.kill(child, signal.SIGKILL)
    assert not is_left
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_child_that_ends_with_systemexit_has_its_status() -> None:
    def ends(code: object) -> Callable[[daemon.Caller], int]:
        def serve(caller: daemon.Caller) -> int:
            raise SystemExit(code)

        return serve

    assert daemon.start(ends(9), 30) == (9, "")
    assert daemon.start(ends(143), 30) == (143, "")
    for code in ("text", None, 0):
        assert daemon.start(ends(code), 30).status == daemon._FAILED


def test_one_datagram_a_call(manager: Manager) -> None:
    notifier = Notifier({ADDRESS: manager.address})
    assert notifier
    notifier.notify("READY=1", "STATUS=up")
    notifier.notify("STOPPING=1")
    assert manager.heard() == ["READY=1\nSTATUS=up", "STOPPING=1"]


def test_the_environment_gives_the_address_away(manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": manager.address, "OTHER": "x"}
    Notifier(environment).notify("READY=1")
    assert environment == {"OTHER": "x"}
    assert manager.heard() == ["READY=1"]


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}], ids=["unset", "empty"])
def test_without_an_address_nobody_is_notified(
    environment: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier(dict(environment))
    assert not notifier
    notifier.notify("READY=1")
    assert not caplog.records


@pytest.mark.parametrize("address", ["vsock:2:1", "relative/path"])
def test_what_is_no_address_is_said_and_not_told(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert not Notifier({ADDRESS: address})
    assert f"NOTIFY_SOCKET={address}: neither a path" in caplog.text


def test_what_cannot_be_sent_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Notifier({ADDRESS: f"{tmp_path}/nobody"}).notify("READY=1")
    Notifier({ADDRESS: f"{tmp_path}/{'x' * 200}"}).notify("READY=1")
    assert caplog.text.count("cannot be notified") == 2


def test_a_manager_that_does_not_listen_holds_nobody_up(
    manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier({ADDRESS: manager.address})
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
