"""The socket on which a service manager listens."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest


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
