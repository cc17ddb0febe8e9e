"""`flatten` and `apply`: writing images."""

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
from diffmergefs.cli.output import new_table, print_json, print_table, printable, progress
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.apply import apply_diff
from diffmergefs.writing.dependants import REASONS
from diffmergefs.writing.flatten import flatten as flatten_view


@click.command()
@image_options
@strict_option
@click.option("-o", "--output", required=True, type=PATH, help="The new image file.")
@force_option
@click.option("--verify", is_flag=True, help="Read both back and compare before it is published.")
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
    """Write IMAGE out as a new standalone file: sparse, whole or not there at all.

    Blocks are shared with the layers (reflinked) where the filesystem can, and copied elsewhere.

    \b
    Examples:
      diffmergefs flatten /srv/snapshots/pandas -o pandas.mem
      diffmergefs flatten --base mem_file --diff mem_diff -o whole.mem --verify
    """
    with (found := source.open()).view:
        view = found.view
        with progress("flatten", sum(view.visible_bytes())) as moved:
            result = flatten_view(
                view, output, force=force, verify=verify, seal=seal, progress=moved
            )
        paths = [layer.path for layer in view.layers]
    rows = list(zip(paths, result.copied, result.shared, strict=True))
    if as_json:
        layers = [{"path": p, "copied": c, "shared": s} for p, c, s in rows]
        print_json({"output": output, "size": result.size, "holes": result.holes, "layers": layers})
        return
    table = new_table("LAYER", ">COPIED", ">SHARED")
    for path, copied, shared in rows:
        table.add_row(printable(path), str(copied), str(shared))
    print_table(table)
    click.echo(
        f"{printable(output)}: {result.size} bytes, {sum(result.copied)} copied,"
        f" {sum(result.shared)} shared, {result.holes} holes"
        + (", verified" if verify else "")
        + (", sealed" if seal else "")
    )


def _reasons(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> frozenset[str]:
    names = frozenset(value.split(",")) if value is not None else frozenset()
    if unknown := names - set(REASONS):
        raise click.BadParameter(
            f"{', '.join(sorted(unknown))!r} is not among {', '.join(REASONS)}"
        )
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
    " (layer), has further names (links), is open elsewhere (open), is shown by a mount (mounted),"
    " or although DIFF covers nearly all of its data (order).",
)
@trust_options
def apply(diff: str, base: str, sync: bool, force: frozenset[str], policy: TrustPolicy) -> None:
    """Copy the data extents of DIFF onto BASE, in place: the classic merge.

    BASE must be a copy that you own: it is changed. It is refused where anything is seen to depend
    on it, and where the two look swapped. Both must have the same size. An interrupted apply can
    be repeated. Prints the bytes copied.

    \b
    Example:
      cp --reflink=auto mem_file whole.mem && diffmergefs apply mem_diff whole.mem
    """
    with progress("apply") as moved:
        copied = apply_diff(diff, base, sync=sync, policy=policy, force=force, progress=moved)
    click.echo(f"{copied} bytes copied")
