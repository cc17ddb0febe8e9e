"""A goal: a number of what was measured, or two against each other, and what it must reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.bench.figures import Limit, Spread, difference, ratio, spread, verdict

Cases = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Series:
    """One series of one case. Several names: that with the least median."""

    case: str
    names: tuple[str, ...]

    def values(self, cases: Cases) -> list[float]:
        """What was measured; raises Absent with the reason where it was not."""
        if self.case not in cases:
            raise Absent(f"the case {self.case} was not run")
        case = cases[self.case]
        found = [case["series"][name]["values"] for name in self.names if name in case["series"]]
        if not any(found):
            raise Absent(_why(case["missing"], self.names[0]) or f"no series {self.names[0]!r}")
        return min((values for values in found if values), key=lambda v: spread(v).median)


def _why(missing: Mapping[str, str], name: str) -> str | None:
    # What is missing is named by its contestant: the beginning of its series' names, "" of all.
    keys = sorted((key for key in missing if name.startswith(key)), key=len)
    return missing[keys[-1]] if keys else None


class Absent(Exception):
    """A series is not there; the message says why."""


@dataclass(frozen=True)
class Floor:
    """What can be had at all of a goal's number: that of a program which does only what it must.

    `over` and `under` take the place of the goal's own. The program that is measured for it lies
    in the same case, so that it ran in the same rounds.
    """

    what: str
    """What does only what it must, for the table."""
    within: str
    """What sets the floor: what lies under both programs."""
    over: Series
    under: Series


@dataclass(frozen=True)
class Goal:
    """One line of the table: `over / under`, or `over - under`, or `over` itself."""

    title: str
    limit: Limit | None
    """None: reported only."""
    over: Series
    under: Series | None = None
    subtract: bool = False
    unit: str = ""
    floor: Floor | None = None
    """Told beside the outcome, which it never changes."""

    @property
    def is_ratio(self) -> bool:
        return self.under is not None and not self.subtract

    @property
    def cases(self) -> set[str]:
        return {self.over.case, *([self.under.case] if self.under else [])}

    def measured(self, cases: Cases) -> Spread:
        """The number; raises Absent."""
        return self._number(cases, self.over, self.under)

    def floor_measured(self, cases: Cases) -> Spread | None:
        """The floor's number, in the goal's unit; None without a floor, or one not measured."""
        if self.floor is None:
            return None
        try:
            return self._number(cases, self.floor.over, self.floor.under)
        except Absent:
            return None

    def _number(self, cases: Cases, above: Series, below: Series | None) -> Spread:
        over = above.values(cases)
        if below is None:
            return spread(over)
        under = below.values(cases)
        if self.subtract:
            return difference(over, under)
        if not all(under):
            raise Absent(f"{below.names[0]!r} has a zero")
        return ratio(over, under)

    def outcome(self, cases: Cases) -> str:
        """'met', 'not met', 'equal', 'reported', or 'not measured: ' and the reason."""
        try:
            measured = self.measured(cases)
        except Absent as absent:
            return f"not measured: {absent}"
        return self._verdict(measured)

    def beyond_floor(self, cases: Cases) -> bool:
        """Whether the goal's floor was measured, and does not meet the limit either."""
        floor = self.floor_measured(cases)
        return floor is not None and self._verdict(floor) == "not met"

    def _verdict(self, measured: Spread) -> str:
        if self.limit is None:
            return "reported"
        return verdict(self.limit, measured, is_ratio=self.is_ratio)


def series(case: str, *names: str) -> Series:
    """A series of a case; of several names that with the least median."""
    return Series(case, names)


def at_most(value: float) -> Limit:
    """The limit of a number that must not be greater."""
    return Limit(value)


def at_least(value: float) -> Limit:
    """The limit of a number that must not be less."""
    return Limit(value, least=True)


def against(
    title: str, case: str, over: str, under: str, limit: Limit | None, floor: Floor | None = None
) -> Goal:
    """The goal that one series of a case is `limit` times another one of it."""
    return Goal(title, limit, series(case, over), series(case, under), floor=floor)
