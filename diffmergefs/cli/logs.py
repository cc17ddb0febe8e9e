"""Where the log of a mount goes, and in which format."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from typing import TypeVar

from diffmergefs.cli.logformat import Json, Lines, Prioritized
from diffmergefs.cli.logqueue import QueuedHandler
from diffmergefs.core.errors import FileAccessError

H = TypeVar("H", bound=logging.Handler)

#: The values of --log-format.
FORMATS = ["auto", "plain", "journald", "json"]
SYSLOG = "/dev/log"
_PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# The journal knows when a line came, and of whom.
_JOURNALD = "%(name)s: %(message)s"


class _SysLogHandler(logging.handlers.SysLogHandler):
    # A syslog that takes nothing off its socket must not hold up the daemon: then lines are lost.

    def _connect_unixsocket(self, address: str) -> None:
        super()._connect_unixsocket(address)  # type: ignore[misc]
        self.socket.setblocking(False)  # type: ignore[attr-defined]


def caller_handler() -> logging.Handler:
    """To stderr, where the caller of a command waits for what it says."""
    return _formatted(logging.StreamHandler(), "plain")


def stderr_handler(log_format: str, *, to_journal: bool = False) -> QueuedHandler:
    """To stderr, which is `to_journal` or not: that is what the format `auto` asks.

    Nobody waits for it to be written, nor for a file.
    """
    if log_format == "auto" and to_journal:
        log_format = "journald"
    return _formatted(QueuedHandler(2, sys.stderr.encoding), log_format)


def file_handler(path: str, log_format: str) -> QueuedHandler:
    """To the end of a file. Raises FileAccessError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as error:
        raise FileAccessError(f"{path}: cannot log there: {error.strerror}") from error
    return _formatted(QueuedHandler(fd), log_format)


def descriptors_of(handler: logging.Handler) -> set[int]:
    """Those that it writes to."""
    if isinstance(handler, QueuedHandler):
        return {handler.fd}
    if isinstance(handler, _SysLogHandler):
        return {handler.socket.fileno()}  # type: ignore[attr-defined]
    return set()


def syslog_handler(log_format: str) -> logging.Handler | None:
    """To syslog; None where there is none."""
    # The handler itself takes a missing syslog in silence, and then complains of each line.
    if not os.path.exists(SYSLOG):
        return None
    handler = _SysLogHandler(SYSLOG, facility=_SysLogHandler.LOG_DAEMON)
    handler.ident = "diffmergefs: "
    # syslog has the time and the priority of each record already.
    handler.setFormatter(Json() if log_format == "json" else Lines())
    return handler


def _formatted(handler: H, log_format: str) -> H:
    formats = {"json": Json(), "journald": Prioritized(Lines(_JOURNALD))}
    handler.setFormatter(formats.get(log_format, Lines(_PLAIN)))
    return handler


def log_to(*handlers_and_levels: logging.Handler | int) -> None:
    """Have our records go to these handlers, each with its level, and nowhere else."""
    log = logging.getLogger("diffmergefs")
    pairs = zip(handlers_and_levels[::2], handlers_and_levels[1::2], strict=True)
    for old in list(log.handlers):
        log.removeHandler(old)
    for handler, level in pairs:
        assert isinstance(handler, logging.Handler) and isinstance(level, int)
        handler.setLevel(level)
        log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
