"""The log of a mount: its destinations and its formats."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
from datetime import UTC, datetime
from typing import Any, TypeVar

from diffmergefs.cli.logqueue import QueuedHandler
from diffmergefs.cli.output import diagnostic, printable
from diffmergefs.core.errors import FileAccessError

H = TypeVar("H", bound=logging.Handler)

#: The values of --log-format.
SYSLOG = "/dev/log"
_PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# The journal adds the time and the process itself.
_JOURNALD = "%(name)s: %(message)s"


# The priorities of sd-daemon(3), which the journal reads at the beginning of a line.
_PRIORITIES = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


def priority(level: int) -> int:
    """syslog's priority, 2 (critical) to 7 (debug), for a level of `logging`."""
    return next((p for known, p in _PRIORITIES.items() if level >= known), 7)


class Lines(logging.Formatter):
    """Formats a record as one line, whatever names are in it.

    The lines of a traceback are indented, so that none of them looks like a record.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """The lines of a traceback."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"    {printable(line)}" for line in lines)


class Sentences(Lines):
    """Formats a record for people at a terminal, as other diagnostics: no date, level or logger."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return diagnostic(record.getMessage())


class Prioritized(logging.Formatter):
    """Formats a record with another formatter and puts `<N>` before each line."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The lines, each of which becomes an entry of the journal."""
        mark = f"<{priority(record.levelno)}>"
        return "\n".join(mark + line for line in self._inner.format(record).split("\n"))


class Json(logging.Formatter):
    """Formats a record as a JSON object on one line, in ASCII.

    Its keys are `time` (UTC, ISO 8601), `level` (as in `warning`), `priority` (syslog's number),
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
        elif record.exc_text:
            facts["exception"] = record.exc_text
        return json.dumps(facts)


class _SysLogHandler(logging.handlers.SysLogHandler):
    # If syslog does not read its socket, lines are lost: the daemon must not wait for it.

    def _connect_unixsocket(self, address: str) -> None:
        super()._connect_unixsocket(address)  # type: ignore[misc]
        self.socket.setblocking(False)  # type: ignore[attr-defined]


def caller_handler() -> logging.Handler:
    """A handler for the stderr of a command whose caller waits for it: plain sentences."""
    handler = logging.StreamHandler()
    handler.setFormatter(Sentences())
    return handler


def stderr_handler(log_format: str, *, to_journal: bool = False) -> QueuedHandler:
    """A handler for stderr that never blocks, and neither does one for a file.

    The format `auto` means `journald` if stderr is the journal (`to_journal`), sentences on a
    terminal, and otherwise `plain`.
    """
    if log_format == "auto" and to_journal:
        log_format = "journald"
    handler = _formatted(QueuedHandler(2, sys.stderr.encoding), log_format)
    if log_format == "auto" and os.isatty(2):
        handler.setFormatter(Sentences())
    return handler


def file_handler(path: str, log_format: str) -> QueuedHandler:
    """A handler that appends to a file. Raises FileAccessError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as error:
        raise FileAccessError(f"{path}: cannot log there: {error.strerror}") from error
    return _formatted(QueuedHandler(fd), log_format)


def descriptors_of(handler: logging.Handler) -> set[int]:
    """The descriptors that a handler writes to."""
    if isinstance(handler, QueuedHandler):
        return {handler.fd}
    if isinstance(handler, _SysLogHandler):
        return {handler.socket.fileno()}  # type: ignore[attr-defined]
    return set()


def syslog_handler(log_format: str) -> logging.Handler | None:
    """A handler for syslog, or None if there is no syslog."""
    # The handler itself ignores a missing syslog, and then reports an error for each line.
    if not os.path.exists(SYSLOG):
        return None
    handler = _SysLogHandler(SYSLOG, facility=_SysLogHandler.LOG_DAEMON)
    handler.ident = "diffmergefs: "
    # syslog adds the time and the priority of each record itself.
    handler.setFormatter(Json() if log_format == "json" else Lines())
    return handler


def _formatted(handler: H, log_format: str) -> H:
    formats = {"json": Json(), "journald": Prioritized(Lines(_JOURNALD))}
    handler.setFormatter(formats.get(log_format, Lines(_PLAIN)))
    return handler


def log_to(levels: dict[logging.Handler, int]) -> None:
    """Send our records to these handlers, each with its level, and nowhere else."""
    log = logging.getLogger("diffmergefs")
    for old in list(log.handlers):
        log.removeHandler(old)
    for handler, level in levels.items():
        handler.setLevel(level)
        log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
