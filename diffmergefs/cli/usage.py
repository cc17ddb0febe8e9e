"""How the command line explains itself: the help of a verb, and the one line of an error."""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import click

from diffmergefs.cli.options import EXPERT
from diffmergefs.core.errors import DiffMergeError

_MOST_NAMES = 10_000  # how many are compared with a path that does not exist
#: What an argument of several verbs means.
ARGUMENTS = {
    "IMAGE": (
        "A snapshot directory (/srv/snapshots/pandas) or its memory file; a numbered layer file,"
        " which stands for the chain up to it (/srv/layers/002-pandas.mem); or SOURCE/TAG in any"
        " layout. To name the layers instead: --base FILE --diff FILE [--diff FILE ...], oldest"
        " first."
    ),
    "SOURCE": (
        "A directory of snapshots: a forkd store, numbered layers, or superserve or Cloud"
        " Hypervisor snapshots."
    ),
}


class Verb(click.Command):
    """A command whose help explains IMAGE and SOURCE, and has its expert options at the end."""

    # click's own message about surplus arguments has no next step.
    allow_extra_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Also say what was meant by an unknown option or a surplus argument."""
        with options_suggested(ctx, args):
            surplus = super().parse_args(ctx, list(args))
        if surplus and not ctx.resilient_parsing:
            diffs = [p.opts[0] for p in self.params if p.multiple and ctx.params.get(p.name or "")]
            step = f"; give one {diffs[0]} for each file" if diffs else ""
            ctx.fail(f"unexpected argument {' '.join(surplus)}{step}")
        return surplus

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what its arguments mean, its own options, and those for experts."""
        names = argument_names(self)
        params = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        parts = {
            "Arguments": [(name, ARGUMENTS[name]) for name in names if name in ARGUMENTS],
            "Options": _records(ctx, (p for p in params if p.name not in EXPERT)),
            "Expert": _records(ctx, (p for p in params if p.name in EXPERT)),
        }
        for title, records in parts.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def argument_names(command: click.Command) -> list[str]:
    """The names of its arguments, as its usage line has them."""
    return [
        word
        for param in command.params
        if isinstance(param, click.Argument)
        for word in re.findall(r"[A-Z]+", param.metavar or (param.name or "").upper())
    ]


def _records(ctx: click.Context, options: Iterable[click.Option]) -> list[tuple[str, str]]:
    return [record for option in options if (record := option.get_help_record(ctx))]


@contextmanager
def options_suggested(ctx: click.Context, args: Sequence[str]) -> Iterator[None]:
    """Have an unknown option among `args` refused with the one that was probably meant."""
    args = list(args)  # click empties its list
    try:
        yield
    except click.NoSuchOption as error:
        # To click, -json is -j and more.
        given = next((arg for arg in args if arg.startswith(error.option_name)), "")
        name = given.partition("=")[0] or error.option_name
        options = [p for p in ctx.command.get_params(ctx) if isinstance(p, click.Option)]
        known = [name for option in options for name in option.opts]
        near = did_you_mean(f"--{name.lstrip('-')}", known)
        raise click.UsageError(with_step(f"no such option {name}", near), ctx) from None


def did_you_mean(name: str, known: Iterable[str], folder: str = "") -> str:
    """A question that names what is nearest to `name`, in `folder`; '' if nothing is near."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, 1)
    return f"did you mean {os.path.join(folder, near[0])}?" if near else ""


def error_line(error: DiffMergeError) -> str:
    """The message of the error, which ends with a next step: for a missing path, what is near."""
    text = str(error)
    path = text.removesuffix(f": {os.strerror(errno.ENOENT)}")
    near = "" if path == text else _near_path(path)
    return with_step(text, near or error.remedy)


def _near_path(path: str) -> str:
    # A question that names a path near to one that does not exist; '' if there is none.
    folder, name = os.path.split(path.rstrip("/"))
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    with suppress(OSError), os.scandir(folder or ".") as entries:
        beside = [entry.name for entry in itertools.islice(entries, _MOST_NAMES)]
        return did_you_mean(name, beside, folder)
    return ""


def usage_line(error: click.ClickException) -> str:
    """The error in one line that ends with a next step: its own, or to see the help."""
    text = " ".join(error.format_message().split()).rstrip(".")
    ctx = getattr(error, "ctx", None)
    path = ctx.command_path if ctx else "diffmergefs"
    verb = path.partition(" ")[2]
    line = with_step(text, f"see {path} --help")
    return f"{verb}: {line}" if verb else line


def with_step(text: str, step: str) -> str:
    """The text, with `step` after a semicolon unless it has a next step, or `step` is empty."""
    return text if "; " in text or not step else f"{text}; {step}"
