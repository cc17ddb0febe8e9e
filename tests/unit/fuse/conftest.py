"""Marks the tests that import pyfuse3 `fuse`, and leaves them out where it is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

_WITH_PYFUSE3 = {
    f"test_{name}.py"
    for name in (
        "lifecycle",
        "mounting",
        "operations",
        "readloop",
        "replies",
        "session",
        "slow_layers",
    )
}

collect_ignore = [] if find_spec("pyfuse3") else sorted(_WITH_PYFUSE3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them; this hook sees the tests of all folders."""
    for item in items:
        if item.path.parent.name == "fuse" and item.path.name in _WITH_PYFUSE3:
            item.add_marker("fuse")
