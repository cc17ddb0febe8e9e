"""The verbs, each imported when it is used."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import NamedTuple

import click

from diffmergefs.cli.options import with_values
from diffmergefs.cli.usage import did_you_mean, options_suggested, with_step


class Entry(NamedTuple):
    """A verb in the table: its module in this package, its command there, and its line of help."""

    module: str
    command: str
    group: str
    summary: str


_LOOK, _SERVE, _WRITE, _CHECK, _MORE = "Look", "Serve", "Write", "Check", "More"

#: The verbs, in the order of the help.
TABLE = {
    "list": Entry("look", "list_", _LOOK, "print one line per snapshot of a directory"),
    "info": Entry("look", "info", _LOOK, "print the layers of an image, and what each holds"),
    "map": Entry("map", "map_", _LOOK, "show which layer supplies which part of an image"),
    "compare": Entry("difference", "compare", _LOOK, "compare two images: where do they differ?"),
    "mount": Entry("mount", "mount", _SERVE, "show every snapshot of a directory as a whole image"),
    "uffd": Entry("uffd", "uffd", _SERVE, "serve images to Firecracker's page-fault backend"),
    "umount": Entry("mounted", "umount", _SERVE, "unmount"),
    "status": Entry("mounted", "status", _SERVE, "list mounts and servers, or print statistics"),
    "prefetch": Entry("prefetch", "prefetch", _SERVE, "show or remove an image's working set"),
    "flatten": Entry("write", "flatten", _WRITE, "write an image to a standalone file"),
    "squash": Entry("write", "squash", _WRITE, "merge adjacent diffs of a chain into one"),
    "rediff": Entry("difference", "rediff", _WRITE, "write the sparse diff between two images"),
    "apply": Entry("write", "apply", _WRITE, "merge a diff into a base, in place"),
    "seal": Entry("integrity", "seal", _CHECK, "record where a layer has data, with checksums"),
    "verify": Entry("integrity", "verify", _CHECK, "check layers against everything recorded"),
    "doctor": Entry("doctor", "doctor", _CHECK, "check this machine, a filesystem and diff files"),
    "demo": Entry("demo", "demo", _MORE, "run the main commands on a small chain"),
    "completion": Entry("completion", "completion", _MORE, "print a script for bash, zsh or fish"),
    "install-extras": Entry("extras", "install_extras", _MORE, "link man pages and completion"),
}
#: Other names of verbs.
ALIASES = {"unmount": "umount"}
#: `help VERB` is `VERB --help`.
_HELP, _HELP_OPTION = "help", "--help"


class Verbs(click.Group):
    """The group of all verbs.

    Importing what they all need takes as long as a verb takes to start.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Also print the help if there are no arguments, and take `help VERB`."""
        if not args and not ctx.resilient_parsing:
            with suppress(OSError):
                click.echo(ctx.get_help(), err=True)
            ctx.exit(click.UsageError.exit_code)
        while args[:1] == [_HELP]:
            args = [*args[1:], _HELP_OPTION]
        verb = next((arg for arg in args if arg in TABLE), None)
        if verb and args[0].startswith("--") and args[0] != _HELP_OPTION:
            ctx.fail(f"options stand after the command; type diffmergefs {verb} {args[0]}")
        with options_suggested(ctx, args):
            return super().parse_args(ctx, list(args))

    def list_commands(self, context: click.Context) -> list[str]:
        """The names of the verbs, in alphabetical order."""
        return sorted(TABLE)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The verb's command, or None if there is no such verb."""
        return load(name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb that `args` begin with, and its arguments with all optional values filled in."""
        verb = load(args[0])
        if verb is None:
            if ctx.resilient_parsing:
                return None, None, args[1:]
            near = did_you_mean(args[0], [*TABLE, *ALIASES, _HELP])
            ctx.fail(with_step(f"no such command: {args[0]}", near))
        return verb.name, verb, with_values(verb, args[1:])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line for each verb, by group. Loads no verb."""
        width = max(map(len, TABLE))
        for group in dict.fromkeys(entry.group for entry in TABLE.values()):
            with formatter.section(group):
                formatter.write_dl(
                    [(n.ljust(width), e.summary) for n, e in TABLE.items() if e.group == group]
                )

    def shell_complete(
        self, ctx: click.Context, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        """The verbs, or options, that begin so. Loads no verb."""
        from click.shell_completion import CompletionItem

        summaries = {name: entry.summary for name, entry in TABLE.items()} | {_HELP: "show help"}
        verbs = [
            CompletionItem(name, help=text)
            for name, text in summaries.items()
            if name.startswith(incomplete)
        ]
        return [*verbs, *click.Command.shell_complete(self, ctx, incomplete)]


def load(name: str) -> click.Command | None:
    """The command of this name or alias, or None. Imports its module, and what that needs."""
    entry = TABLE.get(ALIASES.get(name, name))
    if entry is None:
        return None
    command: click.Command = getattr(
        import_module(f"diffmergefs.cli.{entry.module}"), entry.command
    )
    return command
