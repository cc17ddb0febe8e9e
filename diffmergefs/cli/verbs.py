"""The verbs, each loaded when it is asked for."""

from __future__ import annotations

import click

from diffmergefs.cli.optionalvalue import with_values

NAMES = (
    *("apply", "compare", "completion", "demo", "doctor", "flatten", "info", "list", "map"),
    *("mount", "prefetch", "rediff", "seal", "squash", "status", "umount", "verify"),
)


class Verbs(click.Group):
    """The group of all verbs.

    To load what they all need takes as long again as the start of one of them.
    """

    def list_commands(self, context: click.Context) -> list[str]:
        """Their names, in alphabetical order."""
        return sorted(NAMES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The verb's command, or None if there is no such verb."""
        return load(name)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb that `args` begin with, and its arguments, none of which lacks its value."""
        name, command, rest = super().resolve_command(context, args)
        return name, command, with_values(command, rest) if command else rest


def load(name: str) -> click.Command | None:
    """The command of this name, or None. Its module is imported now, and with it what it needs."""
    match name:
        case "apply":
            from diffmergefs.cli.write import apply

            return apply
        case "compare":
            from diffmergefs.cli.compare import compare

            return compare
        case "completion":
            from diffmergefs.cli.completion import completion

            return completion
        case "demo":
            from diffmergefs.cli.demo import demo

            return demo
        case "doctor":
            from diffmergefs.cli.doctor import doctor

            return doctor
        case "flatten":
            from diffmergefs.cli.write import flatten

            return flatten
        case "info":
            from diffmergefs.cli.look import info

            return info
        case "list":
            from diffmergefs.cli.look import list_

            return list_
        case "map":
            from diffmergefs.cli.map import map_

            return map_
        case "mount":
            from diffmergefs.cli.mount import mount

            return mount
        case "prefetch":
            from diffmergefs.cli.prefetch import prefetch

            return prefetch
        case "rediff":
            from diffmergefs.cli.rediff import rediff

            return rediff
        case "seal":
            from diffmergefs.cli.seal import seal

            return seal
        case "squash":
            from diffmergefs.cli.squash import squash

            return squash
        case "status":
            from diffmergefs.cli.status import status

            return status
        case "umount":
            from diffmergefs.cli.umount import umount

            return umount
        case "verify":
            from diffmergefs.cli.verify import verify

            return verify
    return None
