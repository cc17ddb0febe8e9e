"""Names and log records as text: in lines, with the priorities of syslog in front, or as JSON."""

from __future__ import annotations

import json
import logging
import os
import unicodedata
from datetime import UTC, datetime
from typing import Any

# Unicode's categories of control characters, line and paragraph separators.
_ESCAPED = frozenset({"Cc", "Zl", "Zp"})

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


def printable(text: str) -> str:
    """The text with what a terminal must not get as it is (a hard file name) as escapes.

    That is what is not valid UTF-8, control characters, and what else ends a line.
    """
    try:
        line = os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        line = ascii(text)[1:-1]
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in _ESCAPED else c for c in line)


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
