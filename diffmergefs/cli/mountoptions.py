"""Mount options: `-o`, as mount(8) and fstab have them, beside the long options of `mount`."""

from __future__ import annotations

import re
from collections.abc import Iterable

import click

from diffmergefs.cli.optionalvalue import OptionalValue, with_values


def split_options(options: Iterable[str]) -> list[str]:
    """The single options of several `-o`, without `ro`, which a view is anyway.

    A comma that belongs to a value is written as `\\,` and a backslash before it as `\\\\`.
    """
    pieces = re.findall(r"(?:\\.|[^,])+", ",".join(options))
    found = (re.sub(r"\\([\\,])", r"\1", piece) for piece in pieces)
    return [option for option in found if option != "ro"]


def option_name(option: str) -> str:
    """The name of the long option that a mount option stands for."""
    return option.partition("=")[0].replace("_", "-")


class MountCommand(click.Command):
    """Takes its long options as -o options too, as fstab has them: `-o open_rw,page_size=16384`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, with_values(self, args))
        options = split_options(ctx.params["options"])
        names = self.long_names()
        mine = [option for option in options if option_name(option) in names]
        ctx.params["options"] = tuple(o for o in options if o not in mine)
        self._take(ctx, mine)
        return rest

    def long_names(self) -> set[str]:
        """The names that are mount options too."""
        names = {name for param in self.params for name in param.opts if name.startswith("--")}
        return {name[2:] for name in names} - {"help"}

    def _take(self, ctx: click.Context, options: list[str]) -> None:
        arguments = []
        for option in options:
            _, equals, value = option.partition("=")
            arguments.append(f"--{option_name(option)}{equals}{value}")
        values, _, _ = self.make_parser(ctx).parse_args(with_values(self, arguments))
        for param in self.params:
            if isinstance(param, click.Option) and param.name in values:
                if param.multiple:
                    values[param.name] = [*ctx.params[param.name], *values[param.name]]
                param.handle_parse_result(ctx, values, [])


def complete_options(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """What the shell offers for the last option of an `-o`."""
    before, comma, begun = incomplete.rpartition(",")
    names = [
        name[2:].replace("-", "_") + end
        for option in context.command.params
        if isinstance(option, click.Option)
        for name in option.opts
        if name.startswith("--") and name != "--help"
        for end in _ends(option)
    ]
    return [before + comma + name for name in sorted(names) if name.startswith(begun)]


def _ends(option: click.Option) -> list[str]:
    if isinstance(option, OptionalValue):
        return ["", "="]
    return [""] if option.is_flag else ["="]
