"""What was logged."""

from __future__ import annotations

import logging

import pytest


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    """The messages of this level or a higher one, oldest first."""
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings and errors, oldest first."""
    return messages(caplog, logging.WARNING)
