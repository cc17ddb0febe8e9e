"""Remembered results that belong to another user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.logged import warnings
from tests.support.subjects.verified import OLD, directory, memory

__all__ = ["directory"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory away")
@pytest.mark.parametrize("what", ["directory", "database"])
def test_what_another_user_owns_is_not_believed(
    directory: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    memory(directory).remember("sha256", OLD, "planted")
    [database] = directory.iterdir()
    os.chown(directory if what == "directory" else database, 1234, -1)
    assert memory(directory).recall("sha256", OLD) is None
    assert "belongs to user 1234" in warnings(caplog)[0]
