"""`rediff`: sparse diffs from complete images, one by one or for a whole store."""

from __future__ import annotations

from dataclasses import asdict

import click

from diffmergefs.analysis.compare import bytes_to_compare
from diffmergefs.cli.inputs import jobs_option, opened_side, plain_option, side_diffs
from diffmergefs.cli.options import (
    PATH,
    force_option,
    json_option,
    seal_option,
    store_options,
    trust_options,
)
from diffmergefs.cli.output import (
    print_diagnostic,
    print_json,
    print_table,
    printable,
    progress,
)
from diffmergefs.core.errors import counted
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.newstore import NewStore
from diffmergefs.writing.rediff import RediffResult
from diffmergefs.writing.rediff import rediff as rediff_views
from diffmergefs.writing.storediff import StoreRediff


@click.command()
@click.argument("parent", required=False, type=PATH)
@click.argument("child", required=False, type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="The new diff, or the new store.")
@click.option(
    "--store",
    type=PATH,
    metavar="DIR",
    help="Make a new store from the forkd store DIR, with a sparse diff for each dense link.",
)
@click.option("--skip-broken", is_flag=True, help="With --store: leave out broken snapshots.")
@side_diffs("parent")
@side_diffs("child")
@plain_option
@force_option
@click.option(
    "--verify", is_flag=True, help="Merge PARENT and the diff and compare before publishing it."
)
@seal_option
@jobs_option
@json_option
@trust_options
@store_options
def rediff(
    parent: str | None,
    child: str | None,
    output: str,
    store: str | None,
    skip_broken: bool,
    parent_diffs: tuple[str, ...],
    child_diffs: tuple[str, ...],
    plain: bool,
    force: bool,
    verify: bool,
    seal: bool,
    jobs: int,
    as_json: bool,
    policy: TrustPolicy,
) -> None:
    """Write the sparse diff between two complete images. Merged with PARENT, it gives CHILD.

    Each is an IMAGE (a snapshot directory or a numbered layer) or any other file, which is read as
    a complete image. Only pages that differ are written, including pages that became zero; the rest
    is a hole. The output appears complete or not at all, after a check that its data is exactly
    these pages.

    With --store, every dense link of a forkd store (a complete image that has a parent) becomes a
    sparse diff in a new store. Everything else is copied, and the parents' hashes are recorded
    again. The old store is only read.

    \b
    Examples:
      diffmergefs rediff /srv/snapshots/python /srv/snapshots/pandas -o pandas.diff
      diffmergefs rediff mem_file mem_file --child-diff mem_diff -o again.diff --verify
      diffmergefs rediff --store /srv/snapshots -o /srv/small
    """
    if store is not None:
        if parent is not None or parent_diffs or child_diffs or plain or force:
            raise click.UsageError(
                "--store cannot be combined with PARENT and CHILD, their diffs, --plain or --force"
            )
        with progress("open", unit=""):
            opened = StoreRediff(store, skip_broken=skip_broken, policy=policy)
        with opened, progress("rediff", opened.total_bytes) as advance:
            made = opened.write(output, verify=verify, seal=seal, jobs=jobs, progress=advance)
        _report_store(made, as_json)
        return
    if parent is None or child is None:
        raise click.UsageError("give PARENT and CHILD, or --store DIR")
    if skip_broken:
        raise click.UsageError("--skip-broken needs --store")
    with (
        opened_side(parent, parent_diffs, policy, plain) as before,
        opened_side(child, child_diffs, policy, plain) as after,
        progress("rediff", bytes_to_compare(before, after)) as advance,
    ):
        result = rediff_views(
            before,
            after,
            output,
            force=force,
            verify=verify,
            seal=seal,
            jobs=jobs,
            policy=policy,
            progress=advance,
        )
    _report(output, result, verify, seal, as_json)


def _report(output: str, result: RediffResult, verify: bool, seal: bool, as_json: bool) -> None:
    written = result.written
    print_diagnostic(*written.overridden)
    if written.dense:
        print_diagnostic(
            f"{output}: every page differs, so it has no hole and is taken with --dense only"
        )
    if as_json:
        facts = {"output": output, **asdict(written), "page_size": result.page_size}
        facts |= {"changed_pages": result.changed_pages, "compared_bytes": result.compared_bytes}
        print_json(facts | {"ratio": result.ratio})
        return
    pages = -(-written.size // result.page_size)
    click.echo(
        f"{printable(output)}: {result.changed_pages} of {pages} pages changed;"
        f" {written.data_bytes} bytes written of {written.size} ({result.ratio:.2%}),"
        f" {result.compared_bytes} compared"
        f"{', verified' if verify else ''}{', sealed' if seal else ''}"
    )


def _report_store(made: NewStore, as_json: bool) -> None:
    left_out = (f"left out '{tag}': {reason}" for tag, reason in made.left_out.items())
    print_diagnostic(*made.overridden, *left_out)
    if as_json:
        facts = asdict(made) | {"data_before": made.data_before, "data_bytes": made.data_bytes}
        print_json(facts)
        return
    print_table(
        ("TAG", "PARENT", "DONE", ">SIZE", ">DATA BEFORE", ">DATA NOW"),
        ((s.tag, s.parent, s.done, s.size, s.data_before, s.data_bytes) for s in made.snapshots),
    )
    rediffed = sum(s.done == "rediffed" for s in made.snapshots)
    saved = made.data_before - made.data_bytes
    share = saved / made.data_before if made.data_before else 0
    click.echo(
        f"{printable(made.output)}: {counted(len(made.snapshots), 'snapshot')},"
        f" {counted(rediffed, 'dense link')} rediffed;"
        f" {made.data_before} bytes of data before, {made.data_bytes} now,"
        f" {saved} saved ({share:.2%})"
    )
