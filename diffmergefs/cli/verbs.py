"""The verbs, each imported when it is used."""

from __future__ import annotations

from importlib import import_module

import click

from diffmergefs.cli.options import with_values

#: Each verb's module in this package, and the name of its command there.
TABLE = {
    "apply": ("write", "apply"),
    "compare": ("difference", "compare"),
    "completion": ("completion", "completion"),
    "demo": ("demo", "demo"),
    "doctor": ("doctor", "doctor"),
    "flatten": ("write", "flatten"),
    "info": ("look", "info"),
    "install-extras": ("extras", "install_extras"),
    "list": ("look", "list_"),
    "map": ("map", "map_"),
    "mount": ("mount", "mount"),
    "prefetch": ("prefetch", "prefetch"),
    "rediff": ("difference", "rediff"),
    "seal": ("integrity", "seal"),
    "squash": ("write", "squash"),
    "status": ("mounted", "status"),
    "umount": ("mounted", "umount"),
    "verify": ("integrity", "verify"),
}


class Verbs(click.Group):
    """The group of all verbs.

    Importing what they all need takes as long as a verb takes to start.
    """

    def list_commands(self, context: click.Context) -> list[str]:
        """The names of the verbs, in alphabetical order."""
        return sorted(TABLE)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The verb's command, or None if there is no such verb."""
        return load(name)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb that `args` begin with, and its arguments with all optional values filled in."""
        name, command, rest = super().resolve_command(context, args)
        return name, command, with_values(command, rest) if command else rest


def load(name: str) -> click.Command | None:
    """The command of this name, or None. Imports its module, and what that needs."""
    if name not in TABLE:
        return None
    module, attribute = TABLE[name]
    command: click.Command = getattr(import_module(f"diffmergefs.cli.{module}"), attribute)
    return command
