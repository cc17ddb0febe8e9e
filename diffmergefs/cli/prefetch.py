"""`prefetch`: show or remove the recorded working set of an image."""

from __future__ import annotations

import os
from typing import Any

import click

from diffmergefs.cli.inputs import ImageArguments, image_argument
from diffmergefs.cli.options import (
    state_dir_option,
    store_options,
    with_policy,
    working_set_dir_option,
)
from diffmergefs.cli.output import print_diagnostic, print_json, printable, sized
from diffmergefs.cli.usage import Verb
from diffmergefs.core.errors import DiffMergeError, counted
from diffmergefs.prefetch.push import pieces
from diffmergefs.prefetch.record import Identity, WorkingSet, WorkingSets, identity_of_files
from diffmergefs.stores.lookup import find_image


@click.command(cls=Verb)
@click.option("--show", is_flag=True, help="Print what is recorded, and whether it still fits.")
@click.option("--forget", is_flag=True, help="Remove the record.")
@click.option("--json", "as_json", is_flag=True, help="Print the result and the ranges as JSON.")
@working_set_dir_option
@state_dir_option
@store_options
@with_policy
@image_argument
def prefetch(
    source: ImageArguments,
    show: bool,
    forget: bool,
    as_json: bool,
    working_set_dir: str | None,
) -> int:
    """Show or remove the working set of IMAGE: the pages that a restore touched first.

    `diffmergefs mount --record` records it, and a mount reads those pages into the page cache when
    the image is opened. No layer is opened.

    \b
    Examples:
      diffmergefs prefetch /srv/snapshots/pandas --show
      diffmergefs prefetch --base mem_file --diff mem_diff --forget
    """
    if show == forget:
        raise click.UsageError("give either --show or --forget")
    sets = WorkingSets(working_set_dir, source.policy.state_dir)
    layers = identity_of_files(_layers_of(source))
    if forget:
        return _forget(sets, layers, as_json)
    return _show(sets, layers, as_json)


def _layers_of(source: ImageArguments) -> list[str]:
    if source.base is not None:
        return [source.base, *source.diffs]
    catalog, tag = find_image(source.image or "", source.policy)
    try:
        links = catalog.chain(tag)
    except DiffMergeError as error:
        raise type(error)(f"in {catalog.root}: {error}") from None
    return [os.path.join(catalog.root, link.layer.path) for link in links]


def _forget(sets: WorkingSets, layers: Identity, as_json: bool) -> int:
    path = sets.path(layers)
    forgotten = sets.forget(layers)
    if as_json:
        print_json({"record": path, "forgotten": forgotten})
    elif forgotten:
        click.echo(f"{printable(path)}: removed")
    else:
        print_diagnostic(f"{path}: there is no record")
    return 0


def _show(sets: WorkingSets, layers: Identity, as_json: bool) -> int:
    path, record = sets.path(layers), sets.load(layers)
    reason = record.stale(layers) if record else None
    if as_json:
        print_json(_facts(path, record, reason))
    elif record is None:
        print_diagnostic(f"{path}: there is no record; `mount --record` makes one")
    else:
        _print(path, record, reason)
    return 0 if record is not None and reason is None else 1


def _facts(path: str, record: WorkingSet | None, reason: str | None) -> dict[str, Any]:
    if record is None:
        return {"record": None}
    pushed = pieces(record.ranges, record.layers[0].size)
    return {
        "record": path,
        "recorded": record.recorded,
        "readahead_kib": record.readahead_kib,
        "stale": reason,
        "touched_bytes": record.touched_bytes,
        "prefetched_bytes": sum(stop - start for start, stop in pushed),
        "pieces": len(pushed),
        "layers": [layer.path for layer in record.layers],
        "ranges": [[start, stop] for start, stop in record.ranges],
    }


def _print(path: str, record: WorkingSet, reason: str | None) -> None:
    facts = _facts(path, record, reason)
    readahead = facts["readahead_kib"]
    lines = {
        "record": path,
        "recorded": record.recorded,
        "readahead": "unknown" if readahead is None else f"{readahead} KiB",
        "state": "fits" if reason is None else f"stale: {reason}",
        "touched": f"{sized(facts['touched_bytes'], 'bytes')} in"
        f" {counted(len(record.ranges), 'range')}",
        "prefetched": f"{sized(facts['prefetched_bytes'], 'bytes')} in"
        f" {counted(facts['pieces'], 'piece')}",
    }
    for name, text in lines.items():
        print(f"{name:10}  {printable(text)}")
