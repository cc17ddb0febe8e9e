"""The formats of a log record."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

import pytest

from diffmergefs.cli.logs import Json, Lines, Prioritized, priority

HARD = "a\nb\x1b\udcff é"


def record(level: int, message: str, *, failed: bool = False) -> logging.LogRecord:
    info = None
    if failed:
        try:
            raise RuntimeError(message)
        except RuntimeError:
            info = sys.exc_info()
    return logging.LogRecord("diffmergefs.x", level, "", 0, "%s", (message,), info)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (logging.CRITICAL, 2),
        (logging.ERROR, 3),
        (logging.WARNING, 4),
        (logging.INFO, 6),
        (logging.DEBUG, 7),
        (logging.ERROR + 5, 3),
        (1, 7),
    ],
)
def test_levels_are_syslogs_priorities(level: int, expected: int) -> None:
    assert priority(level) == expected


def test_each_line_has_its_priority_in_front() -> None:
    formatter = Prioritized(Lines("%(name)s: %(message)s"))
    assert formatter.format(record(logging.WARNING, HARD)) == (
        "<4>diffmergefs.x: a\\nb\\x1b\\xff é"
    )
    lines = formatter.format(record(logging.ERROR, "broke\n<0>forged", failed=True)).split("\n")
    assert lines[0] == "<3>diffmergefs.x: broke\\n<0>forged"
    assert len(lines) > 3 and all(line.startswith("<3>    ") for line in lines[1:])


def test_json_is_one_object_a_line() -> None:
    text = Json().format(record(logging.WARNING, HARD))
    assert text.isascii() and "\n" not in text
    found = json.loads(text)
    time = datetime.fromisoformat(found.pop("time"))
    assert time.tzinfo == UTC
    assert found == {
        "level": "warning",
        "priority": 4,
        "logger": "diffmergefs.x",
        "message": HARD,
    }
    text = Json().format(record(logging.ERROR, "broke", failed=True))
    assert "\n" not in text
    assert json.loads(text)["exception"].startswith("Traceback (most recent call last):\n")
