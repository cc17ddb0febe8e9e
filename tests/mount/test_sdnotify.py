"""Notifications to a service manager, over real datagram sockets, and which process sends them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support import mounttable
from tests.support.commands import diffmergefs
from tests.support.images import PAGE, signed
from tests.support.live import held, until
from tests.support.mounts import mounted
from tests.support.stores import write_chain
from tests.support.subjects.daemon import Manager, manager

__all__ = ["manager"]


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


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
