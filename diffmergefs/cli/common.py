"""What the verbs share: naming an IMAGE, trust options, output."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, TypeVar, cast

import click

from diffmergefs.cli.logformat import printable as printable
from diffmergefs.cli.optionalvalue import OptionalValue
from diffmergefs.cli.progress import progress
from diffmergefs.opening.images import Image, open_chain, open_image
from diffmergefs.opening.trust import ALL, CHECKS, TrustPolicy, checks_named
from diffmergefs.system.mountpoint import require_answer

F = TypeVar("F", bound=Callable[..., Any])


class _Path(click.Path):
    # click's own asks for the file's attributes, and so hangs where the file's server does. (Files
    # are opened by those who use them, who say what is wrong with one.)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str:
        return os.fspath(value)


class _LookedInto(_Path):
    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str:
        path = os.fspath(value)
        if ctx is None or not ctx.resilient_parsing:
            require_answer(path)
        return path


#: A path that a verb looks into: refused if it lies in a mount of ours whose daemon hangs.
PATH = _LookedInto()
#: One that it does not look into unless it has decided to: a mountpoint.
MOUNTPOINT = _Path()


def told(text: str) -> str:
    """The line as which a diagnosis is told."""
    return f"diffmergefs: {' '.join(printable(text).split())}"


def talk(text: str) -> None:
    """One line on stderr; nowhere if that takes none, which is no reason to end otherwise."""
    with suppress(OSError):
        print(told(text), file=sys.stderr, flush=True)


def count(number: int, what: str) -> str:
    """`1 diff`, `2 diffs`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def print_json(facts: object) -> None:
    """Facts as JSON on stdout."""
    print(json.dumps(facts, indent=2))


def _page_size(context: click.Context, parameter: click.Parameter, value: int) -> int:
    if value < 512 or value & (value - 1):
        raise click.BadParameter(f"{value} is no power of two of at least 512")
    return value


def _absolute_path(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    # A mount in the background is at home in /.
    if value == "":
        raise click.BadParameter("an empty path names no directory")
    return None if value is None else os.path.abspath(value)


def trust_options(command: F) -> F:
    """What a user vouches for, as options that reach the command as one `policy`."""
    return with_policy(_all_of(command, (*_VOUCHING, *_RECORDS)))


def vouching_options(command: F) -> F:
    """`trust_options` for what looks at nothing that was recorded before."""
    return with_policy(_all_of(command, _VOUCHING))


def _all_of(command: F, options: Sequence[Callable[[F], F]]) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def with_policy(command: F) -> F:
    """Gather those options that are fields of a `TrustPolicy` into the one argument `policy`."""

    @functools.wraps(command)
    def gathered(**values: Any) -> Any:
        # Those that the command has: --allow-outside is for directories of snapshots only.
        names = {field.name for field in fields(TrustPolicy)} & values.keys() - {"verify"}
        named = {name: values.pop(name) for name in names}
        return command(policy=TrustPolicy(**named), **values)

    return cast(F, gathered)


def _checks(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> frozenset[str]:
    try:
        return checks_named([name for value in values for name in value.split(",")])
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _complete_checks(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    before, comma, begun = incomplete.rpartition(",")
    return [before + comma + name for name in CHECKS if name.startswith(begun)]


page_size_option = click.option(
    "--page-size",
    type=int,
    default=TrustPolicy.page_size,
    show_default=True,
    callback=_page_size,
    help="The guest's page in bytes, a power of two.",
)
state_dir_option = click.option(
    "--state-dir",
    type=PATH,
    callback=_absolute_path,
    metavar="DIR",
    help="The state directory, where what was verified or recorded is kept, not the user's own.",
)
working_set_dir_option = click.option(
    "--working-set-dir",
    type=PATH,
    callback=_absolute_path,
    metavar="DIR",
    help="Where records of working sets are kept, not in the user's state directory.",
)
strict_option = click.option(
    "--strict",
    is_flag=True,
    help="Refuse diffs whose holes look filled, of which there is otherwise only a hint: guests"
    " wipe pages too.",
)
_VOUCHING = (
    click.option(
        "--trust-grain",
        cls=OptionalValue,
        bare=ALL,
        multiple=True,
        callback=_checks,
        shell_complete=_complete_checks,
        metavar="[=NAMES]",
        help="Vouch for the diffs' holes where these checks refuse them, as in"
        " --trust-grain=filesystem,copy-up. Without NAMES it means all of them:"
        f" {', '.join(CHECKS)}. If the holes are not right, the guest gets wrong bytes.",
    ),
    click.option(
        "--dense",
        is_flag=True,
        help="Accept diffs without a hole as the complete images that they seem to be.",
    ),
    page_size_option,
    click.option(
        "--allow-writers",
        is_flag=True,
        help="Accept layers that someone has open for writing. If that one writes, the guest gets"
        " wrong bytes or none.",
    ),
)
_RECORDS = (
    click.option("--no-seal", is_flag=True, help="Ignore the seals (FILE.bmap) beside layers."),
    state_dir_option,
)


def _absolute(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    if "" in values:
        raise click.BadParameter("an empty path names no directory")
    return tuple(os.path.abspath(value) for value in values)


def store_options(command: F) -> F:
    """What is vouched for beside `trust_options` where a directory of snapshots is read."""
    command = click.option(
        "--allow-gaps",
        is_flag=True,
        help="Accept numbered layers that leave numbers out, and the lowest as the base whatever"
        " its number. If a layer is missing, the guest gets wrong bytes.",
    )(command)
    return click.option(
        "--allow-outside",
        multiple=True,
        type=PATH,
        callback=_absolute,
        metavar="DIR",
        help="Accept files in DIR, beside the directory of snapshots, where the paths that a"
        " snapshot records lead there. No symlink inside DIR is followed. Repeat it for more.",
    )(command)


def layer_options(command: F) -> F:
    """--base and --diff."""
    command = click.option(
        "--diff",
        "diffs",
        multiple=True,
        type=PATH,
        metavar="FILE",
        help="A sparse diff over what comes before it; repeat it, oldest first.",
    )(command)
    return click.option(
        "--base", type=PATH, metavar="FILE", help="The full base image, with --diff."
    )(command)


def image_options(command: F) -> F:
    """IMAGE, or --base and --diff, and the trust options."""
    command = trust_options(store_options(layer_options(command)))
    return click.argument("image", required=False, type=PATH)(command)


def opened(
    image: str | None, base: str | None, diffs: tuple[str, ...], policy: TrustPolicy
) -> Image:
    """The image that the arguments name; overridden checks and hints are told on stderr."""
    require_one_source(image, base, diffs, "IMAGE", policy)
    with progress("open", unit=""):
        if base is not None:
            found = open_chain(base, diffs, policy)
        else:
            found = open_image(image or "", policy)
    for line in (*found.overridden, *found.hints):
        talk(str(line))
    return found


def require_one_source(
    source: str | None,
    base: str | None,
    diffs: tuple[str, ...],
    what: str,
    policy: TrustPolicy | None = None,
) -> None:
    """Raise click.UsageError unless exactly one of `source` and `base` is given.

    And for a `policy` that allows what only a source can have where there is none.
    """
    if (source is None) == (base is None):
        raise click.UsageError(f"give either {what} or --base FILE [--diff FILE ...]")
    if diffs and base is None:
        raise click.UsageError("--diff needs --base")
    if base is not None and policy is not None:
        for name in ("allow_outside", "allow_gaps"):
            if getattr(policy, name):
                raise click.UsageError(
                    f"--{name.replace('_', '-')} goes with {what};"
                    " --base and --diff name their files themselves"
                )
