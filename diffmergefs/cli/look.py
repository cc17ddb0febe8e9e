"""`list` and `info`: the snapshots of a directory, and the layers of an image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass

import click

from diffmergefs.analysis import info as infos
from diffmergefs.cli.inputs import ImageArguments, image_options
from diffmergefs.cli.options import (
    PATH,
    json_option,
    layout_options,
    store_options,
    strict_option,
    trust_options,
)
from diffmergefs.cli.output import (
    print_diagnostic,
    print_json,
    print_table,
    printable,
    progress,
    sized,
)
from diffmergefs.cli.picture import draw_extents, picture_options, require_matplotlib
from diffmergefs.cli.usage import Verb
from diffmergefs.core.errors import DiffMergeError, FileAccessError, counted
from diffmergefs.core.layer import Layer
from diffmergefs.opening.images import open_snapshot
from diffmergefs.opening.opener import LayerPool, opened_store
from diffmergefs.opening.pins import is_pinned
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import Catalog, read_catalog
from diffmergefs.stores.remarks import remarks, require_store


@dataclass(frozen=True)
class Row:
    """One snapshot in the output of `list`. An unknown value is None. Sizes are in bytes.

    `pinned` says whether the snapshot records its parent's hash; it is None for a base. If the
    snapshot is refused, `reason` is the whole message, `check` the name of the check, and `remedy`
    what the user can do. `hints` are about the snapshot's own layer.
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

    @property
    def state_text(self) -> str:
        """The state for the table, with its reason."""
        if self.reason:
            return f"{self.state}: {self.reason}"
        return f"{self.state}, unpinned" if self.pinned is False else self.state


@click.command("list", cls=Verb)
@click.argument("source", type=PATH)
@layout_options
@click.option("--why", is_flag=True, help="Print which check refuses a broken snapshot, and why.")
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
    """Print one line per snapshot in SOURCE: tag, parent, depth, size, dirty bytes, state.

    The state is 'complete', 'dense' (a complete image although it has a parent) or 'broken' with
    the reason. A snapshot is 'unpinned' if it does not record its parent's hash, so that a replaced
    parent cannot be detected. The extents of every layer are walked. Hashes are not compared; use
    `diffmergefs verify` for that. If a diff's holes look filled, a hint goes to stderr.

    \b
    Examples:
      diffmergefs list /srv/snapshots
      diffmergefs list --why /srv/snapshots
      diffmergefs list --json /srv/snapshots | jq '.[] | select(.state == "broken")'
    """
    catalog = read_catalog(source, layout, suffix, options=policy)
    require_store(catalog)
    held: list[Layer] = []  # keeps shared layers open, so that each is walked once
    rows = []
    with (
        opened_store(source, policy, where="") as pool,
        progress("list", len(catalog.snapshots), unit="snapshots") as advance,
    ):
        for tag in sorted(catalog.snapshots):
            rows.append(_row(catalog, tag, pool, policy, held))
            advance(1)
    print_diagnostic(*remarks(catalog, layout))
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    print_table(
        ("TAG", "PARENT", ">DEPTH", "=SIZE", "=DIRTY", "STATE"),
        ((r.tag, r.parent, r.depth, r.size, r.dirty_bytes, r.state_text) for r in rows),
    )
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
    print_diagnostic(*image.overridden, *hints)
    held.extend(image.view.layers)
    dirty = own.extents.data_bytes
    state = "dense" if image.dense else "complete"
    return Row(tag, snapshot.parent, len(links), size, dirty, state, pinned, hints=hints)


@click.command(cls=Verb)
@image_options
@strict_option
@picture_options(
    "--plot",
    description="Draw the number and lengths of each layer's extents: FILE.png or FILE.svg.",
)
@json_option
def info(source: ImageArguments, plot: str | None, force: bool, as_json: bool) -> None:
    """Print the layers of IMAGE, what each one holds, and how much of it is visible.

    \b
    Examples:
      diffmergefs info /srv/snapshots/pandas
      diffmergefs info --json --base mem_file --diff mem_diff
      diffmergefs info /srv/snapshots/pandas --plot extents.png
    """
    if force and plot is None:
        raise click.UsageError("--force needs a picture: name it with --plot")
    if plot is not None:
        require_matplotlib()
    with (found := source.open()).view as view:
        facts = infos.describe(found)
        print_diagnostic(*infos.notices(found))
        if plot is not None:
            draw_extents(view, source.title, source.policy.page_size, plot, force=force)
    if as_json:
        print_json(facts.as_dict())
        return
    print_table(
        (">#", "LAYER", "=DATA", ">EXTENTS", "=VISIBLE", "=SHADOWED", ">GRAIN", "TRUST"),
        ((n, *astuple(layer)) for n, layer in enumerate(facts.layers)),
    )
    state = ", dense" if facts.dense else ""
    click.echo(
        f"{counted(len(facts.layers), 'layer')}, {sized(facts.size, 'bytes')}, of which"
        f" {sized(facts.holes)} are holes in all; {counted(facts.segments, 'segment')}{state}"
    )
