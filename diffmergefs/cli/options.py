"""Options that several verbs share."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from diffmergefs.opening.trust import ALL, CHECKS, TrustPolicy, checks_named
from diffmergefs.stores.catalog import LAYOUTS
from diffmergefs.system.mounted import mounts_of
from diffmergefs.system.mountpoint import require_answer

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: The options, by their parameters, that stand at the end of each help.
EXPERT = {
    *("allow_gaps", "allow_outside", "allow_writers", "dense", "no_seal", "page_size", "strict"),
    *("state_dir", "trust_grain", "working_set_dir"),
    *("drop_behind", "log_format", "max_background", "no_fast_loop", "readahead", "watchdog"),
}

F = TypeVar("F", bound=Callable[..., Any])


class _Path(click.Path):
    # Unlike click's own it does not stat the file: that would hang if the file's server hangs.
    # (Whatever opens the file reports what is wrong with it.)

    def __init__(self, *, must_answer: bool, absolute: bool = False) -> None:
        super().__init__()
        self._must_answer = must_answer
        self._absolute = absolute

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str:
        path = os.fspath(value)
        if not path:  # an unset variable; as an absolute path it would be the current directory
            self.fail("an empty path names nothing", param, ctx)
        if self._must_answer and not (ctx and ctx.resilient_parsing):
            require_answer(path)
        return os.path.abspath(path) if self._absolute else path


class Size(click.ParamType):  # type: ignore[type-arg]  # click 8.1 has no ParamType[int]
    """A number of bytes: decimal or 0x..., with K, M, G or T. Its value counts units of `unit`.

    So does a number without a letter. The value is between `least` and `most`.
    """

    name = "size"

    def __init__(self, unit: int = 1, least: int = 0, most: int | None = None) -> None:
        self._unit = unit
        self._least = least
        self._most = most

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """The size. Raises click.BadParameter."""
        if isinstance(value, int):
            return value
        if not (found := _NUMBER.fullmatch(value)):
            self.fail(f"{value!r} is not a size like 4096, 0x1000, 4K or 1M", param, ctx)
        number = int(found[1], 0 if found[1][:2].lower() == "0x" else 10)
        if found[2]:
            number = (number << 10 * (1 + _LETTERS.index(found[2].lower()))) // self._unit
        if number < self._least or (self._most is not None and number > self._most):
            most = "" if self._most is None else f" and at most {self._most * self._unit}"
            self.fail(
                f"{value} is {number * self._unit} bytes, but must be at least"
                f" {self._least * self._unit}{most}",
                param,
                ctx,
            )
        return number


_NUMBER = re.compile(r"(0x[0-9a-f]+|[0-9]+)(?:([kmgt])(?:i?b)?)?", re.ASCII | re.IGNORECASE)
_LETTERS = "kmgt"

#: A path that a verb opens. It is refused if it lies in a diffmergefs mount whose daemon hangs, or
#: has died.
PATH = _Path(must_answer=True)
#: The same as an absolute path: a mount in the background has / as its working directory.
DIRECTORY = _Path(must_answer=True, absolute=True)
#: A path that a verb opens only after its own checks: a mountpoint.
MOUNTPOINT = _Path(must_answer=False)


class OptionalValue(click.Option):
    """An option that has the value `bare` if it is given without one, as in GNU programs.

    A value needs `=`: the argument after a bare option is an operand.
    """

    def __init__(self, *names: Any, bare: str, **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.bare = bare


def with_values(command: click.Command, args: Sequence[str]) -> list[str]:
    """The arguments `args` of `command`, with the value of each bare `OptionalValue` filled in."""
    bare = {
        name: f"{name}={option.bare}"
        for option in command.params
        if isinstance(option, OptionalValue)
        for name in option.opts
    }
    end = args.index("--") if "--" in args else len(args)
    return [*(bare.get(arg, arg) for arg in args[:end]), *args[end:]]


def all_of(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    """One decorator in place of these, of which the first is the outermost."""

    def decorated(command: F) -> F:
        return functools.reduce(lambda inner, add: add(inner), reversed(decorators), command)

    return decorated


def with_policy(command: F) -> F:
    """Pass the options that are fields of a `TrustPolicy` to the command as one `policy`."""

    @functools.wraps(command)
    def gathered(**values: Any) -> Any:
        # A command may have only some of them: --allow-outside is for directories of snapshots.
        names = {field.name for field in fields(TrustPolicy)} & values.keys() - {"verify"}
        named = {name: values.pop(name) for name in names}
        return command(policy=TrustPolicy(**named), **values)

    return cast(F, gathered)


def _page_size(context: click.Context, parameter: click.Parameter, value: int) -> int:
    if value < 512 or value & (value - 1):
        raise click.BadParameter(f"{value} is not a power of two of at least 512")
    return value


def _checks(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> frozenset[str]:
    try:
        return checks_named([name for value in values for name in value.split(",")])
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def complete_mountpoints(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The mountpoints that `umount` and `status` can name; directories if none begins so."""
    from click.shell_completion import CompletionItem

    known = mounts_of(os.geteuid() or None)
    found = [CompletionItem(m.path) for m in known if m.path.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="dir")]


def _complete_checks(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    before, comma, begun = incomplete.rpartition(",")
    return [before + comma + name for name in CHECKS if name.startswith(begun)]


def _require_file(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    if value == "-":
        raise click.BadParameter(
            "a pipe has no holes, and the output is a sparse file; name a file (./- for this name),"
            " or mount the image and read it with cat"
        )
    return value


def verify_level_option(when: str) -> Callable[[F], F]:
    """--verify=no|pins|full, whose help says `when` checksums are compared."""
    return click.option(
        "--verify",
        type=click.Choice(["no", "pins", "full"]),
        default=TrustPolicy.verify,
        show_default=True,
        help=f"Which checksums to compare {when}. pins: seals and the recorded hashes of parents,"
        " once per file. full: all of them again. no: none, so the guest may get wrong bytes.",
    )


log_format_option = click.option(
    "--log-format",
    type=click.Choice(["auto", "plain", "journald", "json"]),
    default="auto",
    show_default=True,
    help="The format of log records: lines with date and level (plain), lines that begin with the"
    " priority as <N> (journald), or JSON. auto: journald if stderr is the journal, else plain.",
)


def output_options(what: str, *, verify: str) -> Callable[[F], F]:
    """-o for `what` the verb writes, and --force, --verify (with this help) and --seal."""
    return all_of(
        click.option(
            "-o",
            "--output",
            required=True,
            type=PATH,
            metavar="FILE",
            callback=_require_file,
            help=what,
        ),
        click.option("--force", is_flag=True, help="Replace the output atomically if it exists."),
        click.option("--verify", is_flag=True, help=verify),
        click.option("--seal", is_flag=True, help="Also seal the output (see `seal`)."),
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
page_size_option = click.option(
    "--page-size",
    type=Size(),
    default=TrustPolicy.page_size,
    show_default=True,
    callback=_page_size,
    help="The guest's page size in bytes, a power of two.",
)
state_dir_option = click.option(
    "--state-dir",
    type=DIRECTORY,
    metavar="DIR",
    help="Keep the state (results of verification, working sets) in DIR instead of the user's"
    " state directory.",
)
working_set_dir_option = click.option(
    "--working-set-dir",
    type=DIRECTORY,
    metavar="DIR",
    help="Keep working sets in DIR instead of the state directory.",
)
strict_option = click.option(
    "--strict",
    is_flag=True,
    help="Refuse diffs whose holes look filled. The default is a hint, because guests zero pages"
    " too.",
)
_TRUST_OPTIONS = (
    click.option(
        "--trust-grain",
        cls=OptionalValue,
        bare=ALL,
        multiple=True,
        callback=_checks,
        shell_complete=_complete_checks,
        metavar="[=NAMES]",
        help="Trust the holes of diffs that the named checks refuse, as in"
        f" --trust-grain=filesystem,copy-up. Without NAMES: all checks, {', '.join(CHECKS)}. If"
        " the holes are wrong, the guest gets wrong bytes.",
    ),
    click.option("--dense", is_flag=True, help="Accept diffs without holes as complete images."),
    page_size_option,
    click.option(
        "--allow-writers",
        is_flag=True,
        help="Accept layers that are open for writing. If the writer changes one, the guest gets"
        " wrong bytes or an error.",
    ),
)
#: What the user trusts, as one `policy`, for a verb that does not use earlier records.
trust_options_without_records = all_of(with_policy, *_TRUST_OPTIONS)
#: What the user trusts, and which records are used, as one `policy`.
trust_options = all_of(
    with_policy,
    *_TRUST_OPTIONS,
    click.option("--no-seal", is_flag=True, help="Ignore the seals (FILE.bmap) beside layers."),
    state_dir_option,
)
#: What the user trusts in a directory of snapshots, in addition to `trust_options`.
store_options = all_of(
    click.option(
        "--allow-outside",
        multiple=True,
        type=DIRECTORY,
        metavar="DIR",
        help="Accept files in DIR, outside the directory of snapshots, if a snapshot records their"
        " path. Symlinks inside DIR are not followed. Can be repeated.",
    ),
    click.option(
        "--allow-gaps",
        is_flag=True,
        help="Accept gaps between the numbers of numbered layers, and any number for the base. If"
        " a layer is missing, the guest gets wrong bytes.",
    ),
)
#: --layout and --suffix.
layout_options = all_of(
    click.option("--layout", type=click.Choice(LAYOUTS), help="The layout of SOURCE."),
    click.option("--suffix", help="The suffix of numbered memory files (.mem)."),
)
#: --base and --diff.
layer_options = all_of(
    click.option("--base", type=PATH, metavar="FILE", help="The full base image, with --diff."),
    click.option(
        "--diff",
        "diffs",
        multiple=True,
        type=PATH,
        metavar="FILE",
        help="A sparse diff on top of the layers before it. Repeat it, oldest first.",
    ),
)
