"""Medians, spreads, ratios and verdicts: numbers only.

A ratio is taken round by round, since the contestants of a round ran one right after the other;
its median counts, and its spread is the least and the greatest of the rounds. A ratio whose spread
holds 1.0 is called equal.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, their least and their greatest, and how many they are."""

    median: float
    least: float
    greatest: float
    count: int

    @property
    def equal(self) -> bool:
        """Whether a ratio of this spread cannot be told from 1.0."""
        return self.least <= 1.0 <= self.greatest


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of `above / below`, paired by rounds; what has no partner is left out."""
    return spread([a / b for a, b in zip(above, below, strict=False)])


def difference(left: Sequence[float], right: Sequence[float]) -> Spread:
    """The spread of `left - right`, paired by rounds as in `ratio`."""
    return spread([a - b for a, b in zip(left, right, strict=False)])


@dataclass(frozen=True)
class Limit:
    """What a goal asks of a number: at most, or (`least`) at least, so much."""

    value: float
    least: bool = False

    def holds(self, number: float) -> bool:
        """Whether the number is within the limit."""
        return number >= self.value if self.least else number <= self.value


def verdict(limit: Limit, measured: Spread, *, is_ratio: bool) -> str:
    """'met' if the median is within the limit, else 'not met'.

    Where the limit of a ratio is 1.0 and its spread holds 1.0, a median that is beyond is 'equal'.
    """
    if limit.holds(measured.median):
        return "met"
    return "equal" if is_ratio and limit.value == 1.0 and measured.equal else "not met"
