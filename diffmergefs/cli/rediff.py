"""`rediff`: true diffs out of complete images, one by one or for a whole store."""

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
    count,
    new_table,
    print_diagnostic,
    print_json,
    print_table,
    printable,
    progress,
)
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
    help="Make a new store of the forkd store DIR, with a true diff for each dense link.",
)
@click.option(
    "--skip-broken", is_flag=True, help="With --store: leave out what is broken, with a line each."
)
@side_diffs("parent")
@side_diffs("child")
@plain_option
@force_option
@click.option(
    "--verify", is_flag=True, help="Lay the diff over PARENT and compare before it is published."
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
    """Write the true sparse diff between two complete images: PARENT with it is CHILD.

    Each is an IMAGE (a snapshot directory or a numbered layer) or any other file, taken as it is.
    Only pages that differ are written, those that became zero as zeros; the rest is a hole. The
    output is whole or not there at all, and is proven to hold just these pages as data.

    With --store every dense link of a forkd store, a complete image in spite of its parent,
    becomes a true diff in a new store; all else is copied, and parents' hashes are recorded anew.
    The old store is only read.

    \b
    Examples:
      diffmergefs rediff /srv/snapshots/python /srv/snapshots/pandas -o pandas.diff
      diffmergefs rediff mem_file mem_file --child-diff mem_diff -o again.diff --verify
      diffmergefs rediff --store /srv/snapshots -o /srv/small
    """
    if store is not None:
        if parent is not None or parent_diffs or child_diffs or plain or force:
            raise click.UsageError(
                "--store makes a new directory of DIR: without PARENT and CHILD, their diffs,"
                " --plain and --force"
            )
        _rediff_store(store, output, skip_broken, verify, seal, jobs, as_json, policy)
        return
    if parent is None or child is None:
        raise click.UsageError("give PARENT and CHILD, or --store DIR")
    if skip_broken:
        raise click.UsageError("--skip-broken goes with --store")
    with (
        opened_side(parent, parent_diffs, policy, plain) as before,
        opened_side(child, child_diffs, policy, plain) as after,
        progress("rediff", bytes_to_compare(before, after)) as moved,
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
            progress=moved,
        )
    _report(output, result, verify, seal, as_json)


def _report(output: str, result: RediffResult, verify: bool, seal: bool, as_json: bool) -> None:
    written = result.written
    for line in written.overridden:
        print_diagnostic(line)
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
        + (", verified" if verify else "")
        + (", sealed" if seal else "")
    )


def _rediff_store(
    store: str,
    output: str,
    skip_broken: bool,
    verify: bool,
    seal: bool,
    jobs: int,
    as_json: bool,
    policy: TrustPolicy,
) -> None:
    with progress("open", unit=""):
        opened = StoreRediff(store, skip_broken=skip_broken, policy=policy)
    with opened, progress("rediff", opened.total_bytes) as moved:
        made = opened.write(output, verify=verify, seal=seal, jobs=jobs, progress=moved)
    for line in made.overridden:
        print_diagnostic(line)
    for tag, reason in made.left_out.items():
        print_diagnostic(f"left out '{tag}': {reason}")
    if as_json:
        facts = asdict(made) | {"data_before": made.data_before, "data_bytes": made.data_bytes}
        print_json(facts)
    else:
        _print_store(made)


def _print_store(made: NewStore) -> None:
    table = new_table("TAG", "PARENT", "DONE", ">SIZE", ">DATA BEFORE", ">DATA NOW")
    for s in made.snapshots:
        numbers = map(str, (s.size, s.data_before, s.data_bytes))
        table.add_row(printable(s.tag), printable(s.parent or "-"), s.done, *numbers)
    print_table(table)
    rediffed = sum(s.done == "rediffed" for s in made.snapshots)
    saved = made.data_before - made.data_bytes
    share = saved / made.data_before if made.data_before else 0
    click.echo(
        f"{printable(made.output)}: {count(len(made.snapshots), 'snapshot')},"
        f" {count(rediffed, 'dense link')} made {'a true diff' if rediffed == 1 else 'true diffs'};"
        f" {made.data_before} bytes of data before, {made.data_bytes} now,"
        f" {saved} saved ({share:.2%})"
    )
