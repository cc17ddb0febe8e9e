"""Full counts on demand, and the page that says what was seen at them."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest

#: `make test` runs at most one in so many of the full counts.
SHARE = 10

_SEEN = "seen"
_COMMANDS = {
    "libfuse (fusermount3)": ["fusermount3", "--version"],
    "qemu-img": ["qemu-img", "--version"],
    "fio": ["fio", "--version"],
}


class Row(NamedTuple):
    """One test of the run."""

    group: str
    title: str
    case: str
    seen: Mapping[str, object]
    outcome: str


class Record:
    """A pytest plugin that writes the page `path` when the run ends.

    The page holds what the tests told with `seen`, their argument `full` as a number of inputs if
    the run has the `full` counts and they told none, and nothing that identifies the machine but
    its kernel, processors and memory. A test that was left out counts as one that did not pass.
    """

    def __init__(self, path: Path, *, full: bool) -> None:
        self.path = path
        self._full = full
        self._inputs: dict[str, int] = {}
        self._rows: dict[str, Row] = {}
        self._names: dict[str, tuple[str, str, str]] = {}
        self._left_out = 0
        self._started = datetime.now(UTC)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self._left_out += len(items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if isinstance(item, pytest.Function):
                self._names[item.nodeid] = _names(item)
                call = getattr(item, "callspec", None)
                if call is not None and self._full and "full" in call.params:
                    self._inputs[item.nodeid] = call.params["full"]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A failing set-up or clean-up is a failed test too; the latter may follow a pass.
        if report.when != "call" and report.passed:
            return
        names = self._names.get(report.nodeid, ("", report.nodeid, ""))
        numbers: dict[str, object] = {}
        if report.passed and report.nodeid in self._inputs:
            numbers["inputs"] = self._inputs[report.nodeid]
        for name, told in report.user_properties:
            if name == _SEEN and isinstance(told, Mapping):
                numbers |= told
        self._rows[report.nodeid] = Row(*names, numbers, report.outcome)

    def pytest_sessionfinish(self) -> None:
        if self._rows:
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text("\n".join(self._page()) + "\n", encoding="utf-8")

    def _page(self) -> Iterator[str]:
        passed = sum(row.outcome == "passed" for row in self._rows.values())
        tests = len(self._names) + self._left_out
        minutes = (datetime.now(UTC) - self._started).total_seconds() / 60
        yield "# Reliability: what `make soak` saw"
        yield ""
        yield (
            "This page is written by `make soak`, from what its tests counted in one run. `make"
            f" test` runs the same tests with a share of the counts, one in {SHARE} or fewer."
        )
        yield ""
        day = f"{self._started:%Y-%m-%d}"
        yield f"{day}, {minutes:.0f} minutes: {passed} of {tests} tests passed."
        yield ""
        yield "| what | version |"
        yield "|---|---|"
        for what, version in _versions():
            yield f"| {what} | {version} |"
        for group in dict.fromkeys(row.group for row in self._rows.values()):
            yield ""
            yield f"## {group}"
            yield ""
            yield "| test | case | seen | outcome |"
            yield "|---|---|---|---|"
            rows = [row for row in self._rows.values() if row.group == group]
            for row in _joined(rows):
                cells = (row.title, row.case, _in_words(row.seen), row.outcome)
                yield f"| {' | '.join(map(_cell, cells))} |"
            if totals := _totals(rows):
                yield ""
                yield f"Together: {_in_words(totals)}."


def counter(full: bool) -> Callable[[int], int]:
    """A function that gives the count to run for a full count: that one, or a share of it."""
    return lambda count: count if full else max(1, count // SHARE)


def teller(record: Callable[[str, object], None]) -> Callable[..., None]:
    """A function that notes numbers for the page: `seen(kills=20, litter=3)`."""

    def seen(**numbers: object) -> None:
        record(_SEEN, numbers)
        print(_in_words(numbers))  # with a failure, and with -s

    return seen


def _in_words(numbers: Mapping[str, object]) -> str:
    return "; ".join(f"{name.replace('_', ' ')}: {_said(n)}" for name, n in numbers.items())


def _totals(rows: Iterable[Row]) -> dict[str, object]:
    """The sums of numbers that several tests noted under one name; of `longest_...` the most."""
    told = [(name, n) for row in rows for name, n in row.seen.items() if isinstance(n, int)]
    often = [name for name, times in Counter(name for name, _ in told).items() if times > 1]
    return {
        name: (max if name.startswith("longest") else sum)(n for other, n in told if other == name)
        for name in often
    }


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {value[name]}" for name in sorted(value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _names(item: pytest.Function) -> tuple[str, str, str]:
    """The group, the title and the case of a test."""
    plain = item.originalname.removeprefix("test_").replace("_", " ")
    group = _first_line(item.module) or item.module.__name__
    title = _first_line(item.function) or plain
    call = getattr(item, "callspec", None)
    return group, title, call.id if call else ""


def _joined(rows: Iterable[Row]) -> list[Row]:
    """The rows, but the cases of a test that passed and told no numbers in one."""
    found = list(rows)
    plain = Counter(row.title for row in found if _is_plain(row))
    joined: dict[object, Row] = {}
    for n, row in enumerate(found):
        if _is_plain(row) and plain[row.title] > 1:
            joined.setdefault(row.title, row._replace(case=f"{plain[row.title]} cases"))
        else:
            joined[n] = row
    return list(joined.values())


def _is_plain(row: Row) -> bool:
    return not row.seen and row.outcome == "passed"


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n", 1)[0].rstrip(".")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _versions() -> Iterator[tuple[str, str]]:
    yield "Linux", re.split(r"[-+]", platform.release())[0]
    yield "processors", str(os.cpu_count())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield "GiB of memory", str(round(memory / 2**30))
    yield "Python", platform.python_version()
    for name in ("diffmergefs", "pyfuse3", "trio", "hypothesis"):
        yield name, importlib.metadata.version(name)
    for name, command in _COMMANDS.items():
        yield name, _number(command)


def _number(command: list[str]) -> str:
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return "not installed"
    found = re.search(r"\d+(\.\d+)+", text)
    return found[0] if found else "unknown"
