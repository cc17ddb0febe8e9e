"""Two directories that change places at any moment one likes: the races of an enemy, one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.openat2 import exchange

_APART = 12


class Swapped:
    """Exchanges `one` and `other` just before some of the calls that look names up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, one: Path, other: Path) -> None:
        self._one, self._other = one, other
        self._home = one.stat().st_ino
        self._calls = 0
        self._at: tuple[int, ...] = ()
        for name in ("open", "stat", "readlink"):
            monkeypatch.setattr(os, name, self._counting(getattr(os, name)))

    def moments(self, run: Callable[[], object], apart: int = _APART) -> Iterator[tuple[int, ...]]:
        """For `during`: each call that `run` makes, and each with one of those soon after it."""
        self._calls = 0
        run()
        for first in range(calls := self._calls):
            yield (first,)
            for later in range(first + 1, min(first + apart, calls)):
                yield first, later

    @contextmanager
    def during(self, at: tuple[int, ...]) -> Iterator[None]:
        """Exchange them before the calls of these numbers; afterwards they are in their places."""
        self._at, self._calls = at, 0
        try:
            yield
        finally:
            self._at = ()
            if self._one.stat().st_ino != self._home:
                exchange(self._one, self._other)

    def _counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._calls in self._at:
                exchange(self._one, self._other)
            self._calls += 1
            return real(*args, **kwargs)

        return call
