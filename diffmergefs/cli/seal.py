"""`seal`: recording where a layer's data are, while that is known to be right."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import asdict

import click

from diffmergefs.cli.options import (
    PATH,
    json_option,
    layer_options,
    strict_option,
    vouching_options,
)
from diffmergefs.cli.output import (
    new_table,
    print_diagnostic,
    print_json,
    print_table,
    printable,
    progress,
)
from diffmergefs.core.errors import DiffMergeError
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.sealing import SealResult, seal_layer


@click.command()
@click.argument("layers", metavar="[LAYER...]", nargs=-1, type=PATH)
@layer_options
@click.option(
    "--force",
    is_flag=True,
    help="Replace a seal that says something else. If a copy has harmed the layer's holes, that"
    " seal was the only record of them.",
)
@json_option
@vouching_options
@strict_option
def seal(
    layers: tuple[str, ...],
    base: str | None,
    diffs: tuple[str, ...],
    force: bool,
    as_json: bool,
    policy: TrustPolicy,
) -> int:
    """Write the seal of each LAYER, LAYER.bmap beside it: where its data are, with checksums.

    A diff's holes are its meaning, and ordinary copies (cp, cat, tar) destroy them without a word.
    With its seal beside it a copy merges right all the same: every command takes the extents from
    the seal, once its checksums were compared with the bytes. Seal a diff as soon as its VMM has
    closed it, where it was taken.

    What lies below is named with --base and --diff, oldest first: then each LAYER, or without one
    each --diff, is held against the layers before it. A hint says if its holes look filled, which
    a seal would make last; --strict refuses it.

    The format is bmap 2.0, which bmaptool(1) reads and writes too. A seal that is there is
    never replaced if it says anything else than what is found now, unless with --force. All layers
    are tried; the exit code is that of the first that failed.

    \b
    Examples:
      diffmergefs seal mem_diff
      diffmergefs seal --strict --base mem_file mem_diff
      diffmergefs seal /srv/layers/*.mem --dense
    """
    if not (layers or diffs):
        raise click.UsageError("name the layers to seal")
    if base is None and (diffs or policy.strict):
        raise click.UsageError("--diff and --strict need --base: what lies below the layers")
    done: list[SealResult] = []
    failed = 0
    chain = (base, *diffs, *layers)
    told: set[str] = set()
    for number in range(1 if not layers else 1 + len(diffs), len(chain)):
        below = [path for path in chain[:number] if path]
        try:
            done.append(_seal(str(chain[number]), below if base else [], force, policy, told))
        except DiffMergeError as error:
            print_diagnostic(str(error))
            failed = failed or error.exit_code
    if as_json:
        print_json([asdict(result) for result in done])
    elif done:
        table = new_table("SEAL", "DONE", ">RANGES", ">DATA", ">BLOCK")
        for r in done:
            numbers = map(str, (r.ranges, r.data_bytes, r.block))
            table.add_row(printable(r.path), r.outcome, *numbers)
        print_table(table)
    return failed


def _seal(
    layer: str, below: list[str], force: bool, policy: TrustPolicy, told: set[str]
) -> SealResult:
    known = open_chain(below[0], below[1:], policy) if below else None
    what = f"seal {os.path.basename(layer)}"
    with known.view if known else nullcontext(), progress(what) as moved:
        parents = known.view.layers if known else ()
        result = seal_layer(layer, force=force, policy=policy, parents=parents, progress=moved)
    for line in (*(known.overridden if known else ()), *result.overridden, *result.hints):
        if line not in told:  # the layers below are the same for the next, and one more
            print_diagnostic(line)
        told.add(line)
    return result
