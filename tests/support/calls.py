"""Functions that stand in for others in a test, and call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def first(act: Callable[..., object], then: Callable[..., Any]) -> Callable[..., Any]:
    """`then`, but that each call of it is preceded by one of `act` with the same arguments."""

    def both(*arguments: Any, **named: Any) -> Any:
        act(*arguments, **named)
        return then(*arguments, **named)

    return both
