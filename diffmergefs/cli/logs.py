"""Where the log of a mount goes, and in which format."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
from datetime import UTC, datetime
from typing import Any, TypeVar

from diffmergefs.cli.logqueue import QueuedHandler
from diffmergefs.cli.output import printable
from diffmergefs.core.errors import FileAccessError

H = TypeVar("H", bound=logging.Handler)

#: The values of --log-format.
FORMATS = ["auto", "plain", "journald", "json"]
SYSLOG = "/dev/log"
_PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# The journal knows when a line came, and of whom.
_JOURNALD = "%(name)s: %(message)s"


# sd-daemon(3): what the journal takes off a line's beginning. The levels of logging end in 0.
_PRIORITIES = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


def priority(level: int) -> int:
    """syslog's priority, 2 (critical) to 7 (debug), of a level of `logging`."""
    return next((p for known, p in _PRIORITIES.items() if level >= known), 7)


class Lines(logging.Formatter):
    """A record is one line, whatever names are in it.

    A traceback's lines are set in, so that none of them can pass for a record.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """The lines of a traceback."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"    {printable(line)}" for line in lines)


class Prioritized(logging.Formatter):
    """What another formatter makes of a record, with `<N>` before each line of it."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The lines; the journal makes an entry of each."""
        mark = f"<{priority(record.levelno)}>"
        return "\n".join(mark + line for line in self._inner.format(record).split("\n"))


class Json(logging.Formatter):
    """One JSON object a line, in ASCII, whatever names are in it.

    Its keys: `time` (UTC, ISO 8601), `level` (as in `warning`), `priority` (syslog's number),
    `logger`, `message`, and `exception`, a traceback, if there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        facts: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "priority": priority(record.levelno),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            facts["exception"] = self.formatException(record.exc_info)
        return json.dumps(facts)


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
