"""Options whose value may be left out, as in GNU programs: `--prefetch` or `--prefetch=no`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click


class OptionalValue(click.Option):
    """An option that has the value `bare` where it is given without one.

    A value comes with `=`: what follows the option without one is an operand.
    """

    def __init__(self, *names: Any, bare: str, **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.bare = bare


def with_values(command: click.Command, args: Sequence[str]) -> list[str]:
    """The arguments `args` of `command`, with the value of each such option that lacks it."""
    bare = {
        name: f"{name}={option.bare}"
        for option in command.params
        if isinstance(option, OptionalValue)
        for name in option.opts
    }
    end = args.index("--") if "--" in args else len(args)
    return [*(bare.get(arg, arg) for arg in args[:end]), *args[end:]]
