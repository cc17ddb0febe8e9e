"""`compare`: whether two images are equal, and where they differ."""

from __future__ import annotations

import click

from diffmergefs.analysis.compare import Comparison, bytes_to_compare, count_pages
from diffmergefs.analysis.compare import compare as compare_views
from diffmergefs.cli.inputs import jobs_option, opened_side, plain_option, side_diffs
from diffmergefs.cli.options import PATH, json_option, store_options, trust_options
from diffmergefs.cli.output import print_json, print_table, progress
from diffmergefs.core.extents import ExtentList
from diffmergefs.opening.trust import TrustPolicy


@click.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option("--map", "with_map", is_flag=True, help="Also print the ranges that differ.")
@side_diffs("a")
@side_diffs("b")
@plain_option
@jobs_option
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
        opened_side(a, a_diffs, policy, plain) as one,
        opened_side(b, b_diffs, policy, plain) as other,
        progress("compare", bytes_to_compare(one, other)) as advance,
    ):
        found = compare_views(one, other, page_size=policy.page_size, jobs=jobs, progress=advance)
    if as_json:
        _print_json(found, with_map)
    else:
        _print_text(found, with_map)
    return 0 if found.equal else 1


def _pages(found: Comparison) -> int:
    return -(-found.size // found.page_size)


def _print_json(found: Comparison, with_map: bool) -> None:
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


def _print_text(found: Comparison, with_map: bool) -> None:
    if found.first is None:
        click.echo(f"equal: {found.size} bytes, {found.compared_bytes} compared")
        return
    click.echo(
        f"different: the first difference is at byte {found.first} ({found.first:#x});"
        f" {found.differing_pages} of {_pages(found)} pages of {found.page_size} bytes differ"
    )
    if with_map:
        print_table(
            (">START", ">STOP", ">PAGES"),
            ((*r, count_pages(ExtentList([r]), found.page_size)) for r in found.ranges),
        )
