"""`compare` and `rediff`: what differs between two images, printed or written as sparse diffs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click

from diffmergefs.analysis.compare import Comparison, bytes_to_compare, count_pages
from diffmergefs.analysis.compare import compare as compare_views
from diffmergefs.cli.inputs import with_remarks
from diffmergefs.cli.options import (
    PATH,
    F,
    json_option,
    output_options,
    store_options,
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
from diffmergefs.cli.usage import Verb
from diffmergefs.cli.write import report_diff
from diffmergefs.core.errors import counted
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.view import MergedView
from diffmergefs.opening.images import open_side
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.diffs import rediff as rediff_views
from diffmergefs.writing.storediff import NewStore, StoreRediff


def _side_diffs(side: str) -> Callable[[F], F]:
    """--SIDE-diff: diffs on top of one of two images, as the argument `SIDE_diffs`."""
    return click.option(
        f"--{side}-diff",
        f"{side}_diffs",
        multiple=True,
        type=PATH,
        metavar="FILE",
        help=f"A sparse diff on top of {side.upper()}, which must be a plain file. Repeat it,"
        " oldest first.",
    )


_plain_option = click.option(
    "--plain", is_flag=True, help="Read both as plain files, even if named like 002-name.mem."
)
_jobs_option = click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    metavar="N",
    help="Compare with N processes.",
)


@contextmanager
def _opened_side(
    path: str, diffs: tuple[str, ...], policy: TrustPolicy, plain: bool
) -> Iterator[MergedView]:
    """The view of one of two images. Overridden checks and hints go to stderr."""
    with progress("open", unit=""):
        found = with_remarks(open_side(path, diffs, policy, plain=plain))
    with found.view as view:
        yield view


@click.command(cls=Verb)
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option("--map", "with_map", is_flag=True, help="Also print the ranges that differ.")
@_side_diffs("a")
@_side_diffs("b")
@_plain_option
@_jobs_option
@json_option
@trust_options
@store_options
def compare(
    a: str,
    b: str,
    with_map: bool,
    a_diffs: tuple[str, ...],
    b_diffs: tuple[str, ...],
    plain: bool,
    jobs: int,
    as_json: bool,
    policy: TrustPolicy,
) -> int:
    """Compare two images: print the first byte that differs, and how many pages differ.

    Each is an IMAGE (a snapshot directory or a numbered layer) or any other file, which is read as
    a complete image: its holes are zeros. Both must have the same size. Ranges that both take from
    the same layer file are not read. The exit code is 0 if the images are equal, otherwise 1.

    \b
    Examples:
      diffmergefs compare mem_file mem_file --b-diff mem_diff --map || echo they differ
      diffmergefs compare /srv/snapshots/numpy /srv/snapshots/pandas --json || true
    """
    with (
        _opened_side(a, a_diffs, policy, plain) as one,
        _opened_side(b, b_diffs, policy, plain) as other,
        progress("compare", bytes_to_compare(one, other)) as advance,
    ):
        found = compare_views(one, other, page_size=policy.page_size, jobs=jobs, progress=advance)
    if as_json:
        _print_comparison_json(found, with_map)
    else:
        _print_comparison(found, with_map)
    return 0 if found.equal else 1


def _pages(found: Comparison) -> int:
    return -(-found.size // found.page_size)


def _print_comparison_json(found: Comparison, with_map: bool) -> None:
    facts: dict[str, object] = {
        "equal": found.equal,
        "size": found.size,
        "page_size": found.page_size,
        "first_difference": found.first,
        "pages": _pages(found),
        "differing_pages": found.differing_pages,
        "compared_bytes": found.compared_bytes,
    }
    if with_map:
        facts["ranges"] = [{"start": start, "stop": stop} for start, stop in found.ranges]
    print_json(facts)


def _print_comparison(found: Comparison, with_map: bool) -> None:
    if found.first is None:
        click.echo(f"equal: {sized(found.size, 'bytes')}, {sized(found.compared_bytes)} compared")
        return
    click.echo(
        f"different: the first difference is at byte {found.first} ({found.first:#x});"
        f" {found.differing_pages} of {counted(_pages(found), 'page')} of {found.page_size} bytes"
        f" {'differs' if found.differing_pages == 1 else 'differ'}"
    )
    if with_map:
        print_table(
            (">START", ">STOP", ">PAGES"),
            ((*r, count_pages(ExtentList([r]), found.page_size)) for r in found.ranges),
        )


@click.command(cls=Verb)
@click.argument("parent", required=False, type=PATH)
@click.argument("child", required=False, type=PATH)
@output_options(
    "The new diff, or the new store.",
    verify="Merge PARENT and the diff and compare before publishing it.",
)
@click.option(
    "--store",
    type=PATH,
    metavar="DIR",
    help="Make a new store from the forkd store DIR, with a sparse diff for each dense link.",
)
@click.option("--skip-broken", is_flag=True, help="With --store: leave out broken snapshots.")
@_side_diffs("parent")
@_side_diffs("child")
@_plain_option
@_jobs_option
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
    jobs: int,
    as_json: bool,
    policy: TrustPolicy,
    **how: bool,
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
            made = opened.write(output, jobs=jobs, progress=advance, **how)
        _report_store(made, as_json)
        return
    if parent is None or child is None:
        raise click.UsageError("give PARENT and CHILD, or --store DIR")
    if skip_broken:
        raise click.UsageError("--skip-broken needs --store")
    with (
        _opened_side(parent, parent_diffs, policy, plain) as before,
        _opened_side(child, child_diffs, policy, plain) as after,
        progress("rediff", bytes_to_compare(before, after)) as advance,
    ):
        result = rediff_views(
            before, after, output, force=force, jobs=jobs, policy=policy, progress=advance, **how
        )
    written = result.written
    facts = {
        "page_size": result.page_size,
        "changed_pages": result.changed_pages,
        "compared_bytes": result.compared_bytes,
        "ratio": result.ratio,
    }
    pages = counted(-(-written.size // result.page_size), "page")
    text = f"{result.changed_pages} of {pages} changed; {sized(written.data_bytes, 'bytes')}"
    text += f" written of {sized(written.size)}, {result.ratio:.2%};"
    text += f" {sized(result.compared_bytes)} compared"
    report_diff(output, written, facts, text, as_json, how)


def _report_store(made: NewStore, as_json: bool) -> None:
    left_out = (f"left out '{tag}': {reason}" for tag, reason in made.left_out.items())
    print_diagnostic(*made.overridden, *left_out)
    if as_json:
        facts = asdict(made) | {"data_before": made.data_before, "data_bytes": made.data_bytes}
        print_json(facts)
        return
    print_table(
        ("TAG", "PARENT", "DONE", "=SIZE", "=DATA BEFORE", "=DATA NOW"),
        ((s.tag, s.parent, s.done, s.size, s.data_before, s.data_bytes) for s in made.snapshots),
    )
    rediffed = sum(s.done == "rediffed" for s in made.snapshots)
    saved = made.data_before - made.data_bytes
    share = saved / made.data_before if made.data_before else 0
    click.echo(
        f"{printable(made.output)}: {counted(len(made.snapshots), 'snapshot')},"
        f" {counted(rediffed, 'dense link')} rediffed;"
        f" {sized(made.data_before, 'bytes')} of data before, {sized(made.data_bytes)} now,"
        f" {sized(saved)} saved, {share:.2%}"
    )
