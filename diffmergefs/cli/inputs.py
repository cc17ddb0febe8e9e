"""The images that a verb reads: how a user names them, and opening them."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, cast

import click

from diffmergefs.cli.options import PATH, F, all_of, layer_options, store_options, trust_options
from diffmergefs.cli.output import print_diagnostic, printable, progress
from diffmergefs.opening.images import Image, open_chain, open_image
from diffmergefs.opening.trust import TrustPolicy


@dataclass(frozen=True)
class ImageArguments:
    """The image that the user names, by IMAGE or by --base and --diff, and how far it is trusted.

    Raises click.UsageError if it is named in both ways or in none.
    """

    image: str | None
    base: str | None
    diffs: tuple[str, ...]
    policy: TrustPolicy

    def __post_init__(self) -> None:
        require_one_source(self.image, self.base, self.diffs, "IMAGE", self.policy)

    @property
    def title(self) -> str:
        """The image's name for a heading, printable."""
        return printable(self.image or os.path.basename(self.base or ""))

    def open(self) -> Image:
        """The image, opened. Overridden checks and hints go to stderr."""
        with progress("open", unit=""):
            if self.base is not None:
                found = open_chain(self.base, self.diffs, self.policy)
            else:
                found = open_image(self.image or "", self.policy)
        return with_remarks(found)


def image_argument(command: F, metavar: str = "[IMAGE]") -> F:
    """IMAGE, --base and --diff, passed with `policy` to the command as one `source`."""

    @functools.wraps(command)
    def gathered(
        image: str | None,
        base: str | None,
        diffs: tuple[str, ...],
        policy: TrustPolicy,
        **values: Any,
    ) -> Any:
        return command(source=ImageArguments(image, base, diffs, policy), **values)

    argument = click.argument("image", required=False, type=PATH, metavar=metavar)
    return argument(layer_options(cast(F, gathered)))


def image_or_store_argument(command: F) -> F:
    """As `image_argument`; the image may also be a directory of snapshots."""
    return image_argument(command, "[IMAGE|SOURCE]")


#: The image as one `source`, with all options that say how far it is trusted.
image_options = all_of(trust_options, store_options, image_argument)
image_or_store_options = all_of(trust_options, store_options, image_or_store_argument)


def require_one_source(
    source: str | None, base: str | None, diffs: tuple[str, ...], what: str, policy: TrustPolicy
) -> None:
    """Raise click.UsageError unless exactly one of `source` and `base` is given.

    Also raise it if the `policy` allows something that only a source can have, without a source.
    """
    if source is not None and base is not None:
        also = f"; if {source} is a diff, give one --diff for each file" if diffs else ""
        raise click.UsageError(f"give either {what} or --base FILE, not both{also}")
    if source is None and base is None and not diffs:
        raise click.UsageError(f"give either {what} or --base FILE [--diff FILE ...]")
    if base is None and diffs:
        raise click.UsageError("--diff needs --base")
    for name in ("allow_outside", "allow_gaps") if base is not None else ():
        if getattr(policy, name):
            raise click.UsageError(
                f"--{name.replace('_', '-')} goes with {what}, not with --base and --diff"
            )


def with_remarks(found: Image) -> Image:
    """The image, after printing its overridden checks and hints on stderr."""
    print_diagnostic(*found.overridden, *map(str, found.hints))
    return found
