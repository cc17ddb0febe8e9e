"""A mount's connection to the kernel, which can be ended from outside through fusectl."""

from __future__ import annotations

import contextlib
import logging
import os

from diffmergefs.system import tuning

log = logging.getLogger(__name__)


class Connection:
    """The connection of the FUSE mount with this device number (`major:minor`; None: unknown).

    It keeps fusectl's file open, because the number may belong to another mount later.
    """

    def __init__(self, device: str | None) -> None:
        self._abort = -1
        if device is not None:
            with contextlib.suppress(OSError):  # fusectl is not mounted, or it is another user's
                path = os.path.join(tuning.connection(device), "abort")
                self._abort = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    @property
    def can_abort(self) -> bool:
        """Whether `abort` can end it."""
        return self._abort >= 0

    def abort(self) -> None:
        """End the connection if that can be done: all that wait get an error. Never raises."""
        if self._abort >= 0:
            try:
                os.write(self._abort, b"1")
            except OSError as error:
                log.warning("the connection to the kernel cannot be ended: %s", error.strerror)
