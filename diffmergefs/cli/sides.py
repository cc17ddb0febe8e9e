"""What `rediff` and `compare` share: naming two images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from diffmergefs.cli.common import PATH, F, talk
from diffmergefs.cli.progress import progress
from diffmergefs.core.view import MergedView
from diffmergefs.opening.images import open_side
from diffmergefs.opening.trust import TrustPolicy


def side_diffs(side: str) -> Callable[[F], F]:
    """--SIDE-diff: diffs over the side's file, as the argument `SIDE_diffs`."""
    return click.option(
        f"--{side}-diff",
        f"{side}_diffs",
        multiple=True,
        type=PATH,
        metavar="FILE",
        help=f"A sparse diff over {side.upper()}, which is a plain file then; repeat it, oldest"
        " first.",
    )


plain_option = click.option(
    "--plain", is_flag=True, help="Take both as plain files, even if they are named 002-name.mem."
)
jobs_option = click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    metavar="N",
    help="How many processes share the comparison.",
)


@contextmanager
def opened_side(
    path: str, diffs: tuple[str, ...], policy: TrustPolicy, plain: bool
) -> Iterator[MergedView]:
    """The view of one of two images; overridden checks and hints are told on stderr."""
    with progress("open", unit=""):
        found = open_side(path, diffs, policy, plain=plain)
    for line in (*found.overridden, *found.hints):
        talk(str(line))
    with found.view as view:
        yield view
