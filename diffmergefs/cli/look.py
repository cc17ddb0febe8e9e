"""`list` and `info`: what is there, and what it is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import click

from diffmergefs.analysis import info as infos
from diffmergefs.cli.inputs import ImageArguments, image_options
from diffmergefs.cli.options import PATH, json_option, store_options, strict_option, trust_options
from diffmergefs.cli.output import (
    new_table,
    print_diagnostic,
    print_json,
    print_table,
    printable,
    progress,
)
from diffmergefs.cli.picture import draw_extents, picture_path
from diffmergefs.core.errors import DiffMergeError, FileAccessError
from diffmergefs.core.layer import Layer
from diffmergefs.opening.images import open_snapshot
from diffmergefs.opening.opener import LayerPool, opened_store
from diffmergefs.opening.pins import is_pinned
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.pictures.picture import require_matplotlib
from diffmergefs.stores.catalog import LAYOUTS, Catalog, read_catalog


@dataclass(frozen=True)
class Row:
    """One snapshot as `list` shows it; what could not be found out is None. Sizes in bytes.

    `pinned` says whether it records its parent's hash, and is None for a base. Of one that is
    refused `reason` is the whole line, `check` what was looked at, and `remedy` what helps.
    `hints` are about its own layer.
    """

    tag: str
    parent: str | None
    depth: int | None
    size: int | None
    dirty_bytes: int | None
    state: str
    pinned: bool | None
    reason: str | None = None
    check: str | None = None
    remedy: str | None = None
    hints: tuple[str, ...] = ()


@click.command("list")
@click.argument("source", type=PATH)
@click.option("--layout", type=click.Choice(LAYOUTS), help="What SOURCE holds, if it is unclear.")
@click.option("--suffix", help="The suffix of numbered memory files (.mem).")
@click.option("--why", is_flag=True, help="Say of each that is broken which check, and what helps.")
@json_option
@trust_options
@strict_option
@store_options
def list_(
    source: str,
    layout: str | None,
    suffix: str | None,
    why: bool,
    as_json: bool,
    policy: TrustPolicy,
) -> None:
    """One line a snapshot of SOURCE: tag, parent, depth, size, own dirty bytes, state.

    The state is 'complete', 'dense' (a complete image in spite of its parent) or 'broken' with
    the reason. 'unpinned' is one that records no hash of its parent, so that nothing can tell
    whether the parent is still the same. The extents of every layer are walked. Hashes are not
    compared: `diffmergefs verify` does that. A diff whose holes look filled has a hint on stderr.

    \b
    Examples:
      diffmergefs list /srv/snapshots
      diffmergefs list --why /srv/snapshots
      diffmergefs list --json /srv/snapshots | jq '.[] | select(.state == "broken")'
    """
    catalog = read_catalog(source, layout, suffix, options=policy)
    held: list[Layer] = []  # so that each layer that is shared is walked once
    rows = []
    with (
        opened_store(source, policy, where="") as pool,
        progress("list", len(catalog.snapshots), unit="snapshots") as moved,
    ):
        for tag in sorted(catalog.snapshots):
            rows.append(_row(catalog, tag, pool, policy, held))
            moved(1)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    table = new_table("TAG", "PARENT", ">DEPTH", ">SIZE", ">DIRTY", "STATE")
    for row in rows:
        numbers = (row.depth, row.size, row.dirty_bytes)
        state = f"{row.state}: {row.reason}" if row.reason else row.state
        if row.pinned is False and row.reason is None:
            state += ", unpinned"
        table.add_row(
            printable(row.tag),
            printable(row.parent or "-"),
            *("-" if number is None else str(number) for number in numbers),
            printable(state),
        )
    print_table(table)
    if why:
        _print_refusals(rows)


def _print_refusals(rows: Iterable[Row]) -> None:
    for row in rows:
        if row.reason is not None:
            print(f"\n{printable(row.tag)}")
            found = row.reason.removesuffix(f"; {row.remedy}")
            for name, text in (("check", row.check), ("found", found), ("remedy", row.remedy)):
                print(f"  {name:8} {printable(text or '-')}")


def _row(
    catalog: Catalog, tag: str, pool: LayerPool, policy: TrustPolicy, held: list[Layer]
) -> Row:
    snapshot = catalog.snapshots[tag]
    size = snapshot.memory.key.size if snapshot.memory else None
    pinned = is_pinned(snapshot)

    def refused(error: DiffMergeError) -> Row:
        reason, remedy = (" ".join(text.split()) for text in (str(error), error.remedy))
        state = ("broken", pinned, reason, error.check, remedy)
        return Row(tag, snapshot.parent, None, size, None, *state)

    try:
        links = catalog.chain(tag)
        image = open_snapshot(links, pool, policy)
    except OSError as error:
        return refused(FileAccessError(f"{error.filename or tag}: {error.strerror}"))
    except DiffMergeError as error:
        return refused(error)
    own = image.view.layers[-1]
    hints = tuple(str(hint) for hint in image.hints if hint.path == own.path)
    for line in (*image.overridden, *hints):
        print_diagnostic(line)
    held.extend(image.view.layers)
    dirty = own.extents.data_bytes
    state = "dense" if image.dense else "complete"
    return Row(tag, snapshot.parent, len(links), size, dirty, state, pinned, hints=hints)


@click.command()
@image_options
@strict_option
@click.option(
    "--plot",
    type=PATH,
    metavar="FILE",
    callback=picture_path,
    help="Draw the number of extents of each layer, and how long they are: FILE.png or FILE.svg.",
)
@click.option("--force", is_flag=True, help="Replace the picture if it exists, in one step.")
@json_option
def info(
    source: ImageArguments,
    plot: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """The chain of IMAGE, and for each layer what it holds and what of it is visible.

    IMAGE is a snapshot directory or a numbered layer file; --base and --diff name layers instead.

    \b
    Examples:
      diffmergefs info /srv/snapshots/pandas
      diffmergefs info --json --base mem_file --diff mem_diff
      diffmergefs info /srv/snapshots/pandas --plot extents.png
    """
    if force and plot is None:
        raise click.UsageError("--force is about a picture: name it with --plot")
    if plot is not None:
        require_matplotlib()
    with (found := source.open()).view as view:
        facts = infos.describe(found)
        for line in infos.notices(found):
            print_diagnostic(line)
        if plot is not None:
            title = source.title
            draw_extents(view, title, source.policy.page_size, plot, force=force)
    if as_json:
        print_json(facts.as_dict())
        return
    table = new_table(
        ">#", "LAYER", ">DATA", ">EXTENTS", ">VISIBLE", ">SHADOWED", ">GRAIN", "TRUST"
    )
    for number, layer in enumerate(facts.layers):
        table.add_row(
            str(number),
            printable(layer.path),
            *(str(n) for n in (layer.data_bytes, layer.extents, layer.visible_bytes)),
            *(str(n) for n in (layer.shadowed_bytes, layer.grain)),
            printable(layer.trust),
        )
    print_table(table)
    state = ", dense" if facts.dense else ""
    click.echo(
        f"{len(facts.layers)} layers, {facts.size} bytes, of which {facts.holes} are holes in all;"
        f" {facts.segments} segments{state}"
    )
