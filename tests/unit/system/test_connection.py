"""The connection of a mount is ended on demand, and never otherwise."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from diffmergefs.system import tuning
from diffmergefs.system.connection import Connection
from tests.support.logged import warnings

DEVICE = "0:45"


@pytest.fixture
def abort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that ends the connection of DEVICE."""
    monkeypatch.setattr(tuning, "CONNECTIONS", str(tmp_path))
    path = tmp_path / "45" / "abort"
    path.parent.mkdir()
    path.touch()
    return path


def test_it_is_ended_on_demand(abort: Path) -> None:
    connection = Connection(DEVICE)
    assert connection.can_abort
    assert abort.read_bytes() == b""
    connection.abort()
    assert abort.read_bytes() == b"1"


def test_a_later_mount_with_the_same_number_is_left_alone(abort: Path) -> None:
    connection = Connection(DEVICE)
    abort.rename(abort.with_name("gone"))
    abort.touch()
    connection.abort()
    assert abort.read_bytes() == b""


def test_no_program_inherits_it(abort: Path) -> None:
    connection = Connection(DEVICE)
    assert connection.can_abort
    links = {int(name): f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")}
    (fd,) = (n for n, link in links.items() if os.path.realpath(link) == str(abort))
    assert not os.get_inheritable(fd)


@pytest.mark.parametrize("device", ["0:46", None], ids=["no fusectl", "no mount table"])
def test_what_cannot_be_ended_says_so(device: str | None, abort: Path) -> None:
    connection = Connection(device)
    assert not connection.can_abort
    connection.abort()
    assert abort.read_bytes() == b""


def test_an_end_that_fails_is_logged(
    abort: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("diffmergefs"), "propagate", True)
    connection = Connection(DEVICE)

    def fails(fd: int, text: bytes) -> int:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fails)
        connection.abort()
    assert warnings(caplog) == ["the connection to the kernel cannot be ended: No such device"]
