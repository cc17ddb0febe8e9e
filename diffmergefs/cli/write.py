"""`flatten` and `apply`: write an image to a new file, or a diff into its base."""

from __future__ import annotations

import click

from diffmergefs.cli.inputs import ImageArguments, image_options
from diffmergefs.cli.options import (
    PATH,
    force_option,
    json_option,
    seal_option,
    strict_option,
    trust_options,
)
from diffmergefs.cli.output import print_json, print_table, printable, progress
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.apply import apply_diff
from diffmergefs.writing.dependants import REASONS
from diffmergefs.writing.flatten import flatten as flatten_view


@click.command()
@image_options
@strict_option
@click.option("-o", "--output", required=True, type=PATH, help="The new image file.")
@force_option
@click.option("--verify", is_flag=True, help="Read it back and compare before publishing it.")
@seal_option
@json_option
def flatten(
    source: ImageArguments,
    output: str,
    force: bool,
    verify: bool,
    seal: bool,
    as_json: bool,
) -> None:
    """Write IMAGE to a new standalone sparse file, which appears complete or not at all.

    If the filesystem can reflink, blocks are shared with the layers; otherwise they are copied.

    \b
    Examples:
      diffmergefs flatten /srv/snapshots/pandas -o pandas.mem
      diffmergefs flatten --base mem_file --diff mem_diff -o whole.mem --verify
    """
    with source.open().view as view:
        with progress("flatten", sum(view.visible_bytes())) as advance:
            result = flatten_view(
                view, output, force=force, verify=verify, seal=seal, progress=advance
            )
        paths = [layer.path for layer in view.layers]
    rows = list(zip(paths, result.copied, result.shared, strict=True))
    if as_json:
        layers = [{"path": p, "copied": c, "shared": s} for p, c, s in rows]
        print_json({"output": output, "size": result.size, "holes": result.holes, "layers": layers})
        return
    print_table(("LAYER", ">COPIED", ">SHARED"), rows)
    click.echo(
        f"{printable(output)}: {result.size} bytes, {sum(result.copied)} copied,"
        f" {sum(result.shared)} shared, {result.holes} holes"
        f"{', verified' if verify else ''}{', sealed' if seal else ''}"
    )


def _reasons(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> frozenset[str]:
    names = frozenset(value.split(",") if value is not None else ())
    if unknown := names - set(REASONS):
        named = ", ".join(sorted(unknown))
        raise click.BadParameter(f"{named!r} is not among {', '.join(REASONS)}")
    return names


@click.command()
@click.argument("diff", type=PATH)
@click.argument("base", type=PATH)
@click.option("--sync", is_flag=True, help="fsync BASE at the end.")
@click.option(
    "--force",
    callback=_reasons,
    metavar="NAME[,NAME...]",
    help="Overwrite BASE although it has a seal, which is removed (sealed), is a layer of a store"
    " (layer), has other names (links), is open elsewhere (open), is used by a mount (mounted), or"
    " DIFF covers nearly all of its data (order).",
)
@trust_options
def apply(diff: str, base: str, sync: bool, force: frozenset[str], policy: TrustPolicy) -> None:
    """Merge DIFF into BASE: copy its data extents to BASE, in place.

    BASE is changed, so give a copy that you own. It is refused if something depends on it, or if
    the two files look swapped. Both must have the same size. You can repeat an interrupted apply.
    Print the number of bytes copied.

    \b
    Example:
      cp --reflink=auto mem_file whole.mem && diffmergefs apply mem_diff whole.mem
    """
    with progress("apply") as advance:
        copied = apply_diff(diff, base, sync=sync, policy=policy, force=force, progress=advance)
    click.echo(f"{copied} bytes copied")
