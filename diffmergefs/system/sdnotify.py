"""Telling a service manager how a service is, by sd_notify(3); and whether a log is the journal."""

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

    Without an address nothing is sent. Everyone may read the state of a service, and root does not
    know whose socket a caller named: what is told holds no paths and no tags.
    """

    def __init__(self, address: str | None = None) -> None:
        if address and address[0] not in "/@":
            log.warning("%s=%s: neither a path nor an abstract name; not told", ADDRESS, address)
            address = None
        self._address = address or None

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> Notifier:
        """The one that `environment` names, taken out of it so that no child tells anything."""
        return cls(environment.pop(ADDRESS, None))

    def __bool__(self) -> bool:
        """Whether anybody is told."""
        return self._address is not None

    def tell(self, *assignments: str) -> None:
        """Send assignments such as `READY=1` as one datagram.

        Never waits and never raises: what cannot be sent is lost, with a warning in the log.
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
            log.warning("%s=%s: cannot be told: %s", ADDRESS, self._address, error)


def is_journal(fd: int, stream: str | None) -> bool:
    """Whether `fd` is the connection to the journal that JOURNAL_STREAM's value `stream` names."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"
