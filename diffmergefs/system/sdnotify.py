"""Notifying a service manager by sd_notify(3), and detecting whether a log is the journal."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping

log = logging.getLogger(__name__)

ADDRESS = "NOTIFY_SOCKET"
JOURNAL = "JOURNAL_STREAM"


class Notifier:
    """Sends a service's state to the socket at `address`: a path, or `@` and an abstract name.

    Without an address nothing is sent. Everyone may read a service's state, and root does not know
    who owns the socket that its caller named. So never send paths or tags.
    """

    def __init__(self, address: str | None = None) -> None:
        if address and address[0] not in "/@":
            log.warning("%s=%s: neither a path nor an abstract name; ignored", ADDRESS, address)
            address = None
        self._address = address or None

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> Notifier:
        """A notifier for the address in `environment`, removed there so that no child uses it."""
        return cls(environment.pop(ADDRESS, None))

    def __bool__(self) -> bool:
        """Whether there is an address to notify."""
        return self._address is not None

    def notify(self, *assignments: str) -> None:
        """Send assignments such as `READY=1` as one datagram.

        Never waits and never raises: what cannot be sent is dropped, with a warning in the log.
        """
        if self._address is None:
            return
        name = os.fsencode(self._address)
        name = b"\0" + name[1:] if name[:1] == b"@" else name
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.setblocking(False)
                out.sendto("\n".join(assignments).encode(), name)
        except OSError as error:
            log.warning("%s=%s: cannot be notified: %s", ADDRESS, self._address, error)


def is_journal(fd: int, stream: str | None) -> bool:
    """Whether `fd` is the connection to the journal that JOURNAL_STREAM's value `stream` names."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"
