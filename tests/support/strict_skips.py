"""pytest hooks: with CI=true a skip whose reason is not allowed is a failure.

Elsewhere they change nothing. An expected failure (xfail) is no skip.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from tests.support import skips


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason that was given for a skip, without pytest's prefix."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _forbid(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip that CI does not allow into a failure."""
    if os.environ.get("CI") != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = _reason(report)
    if reason not in skips.ALLOWED:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, for a reason that is not allowed there: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _forbid(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid(report)
    return report
