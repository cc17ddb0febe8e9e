"""`verify`: are the layers of an image still what they were when it was taken?"""

from __future__ import annotations

import click

from diffmergefs.checks import verify as verification
from diffmergefs.checks.verdict import Verdict
from diffmergefs.cli.inputs import ImageArguments, image_options
from diffmergefs.cli.options import json_option, strict_option
from diffmergefs.cli.output import print_diagnostic, print_json, printable, progress

_NAMED = 8  # unpinned parents that stand in the summary


@click.command()
@image_options
@strict_option
@click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    metavar="N",
    help="How many files to read at a time; by default one for each processor.",
)
@json_option
def verify(
    source: ImageArguments,
    jobs: int | None,
    as_json: bool,
) -> int:
    """Check every layer of IMAGE against all that was recorded of it; a line for each fault.

    Checked are the chain (missing parents, cycles), sizes, where extents can be trusted, every
    seal and presence file, and the sha256 that each snapshot records of its parent
    (parent_content_hash). All of it is read anew, whatever was verified before. A parent of which
    no hash is recorded is named as unpinned; that is no fault. The exit code is 0 if all is well
    and 1 if not.

    What proves right is remembered, so that `diffmergefs mount` need not read it again.

    \b
    Examples:
      diffmergefs verify /srv/snapshots/pandas
      diffmergefs verify --json /srv/snapshots/pandas | jq -r '.faults[].message'
      diffmergefs verify --base mem_file --diff mem_diff
    """
    if source.base is not None:
        opened = verification.open_layers(source.base, source.diffs, source.policy)
    else:
        opened = verification.open_image(source.image or "", source.policy)
    with opened, progress("verify", opened.total_bytes) as moved:
        verdict = opened.verify(moved, jobs)
    for line in (*verdict.overridden, *verdict.hints):
        print_diagnostic(line)
    if as_json:
        print_json(verdict.as_dict())
    else:
        for line in _summary(verdict) if verdict.sound else _faults(verdict):
            click.echo(printable(line))
    return 0 if verdict.sound else 1


def _faults(verdict: Verdict) -> list[str]:
    return [" ".join(fault.message.split()) for fault in verdict.faults]


def _summary(verdict: Verdict) -> list[str]:
    pins = sum(layer.pin == "verified" for layer in verdict.layers)
    size = verdict.layers[0].size
    lines = [f"sound: {len(verdict.layers)} layers of {size} bytes; pins verified: {pins}"]
    children = [layer.tag or "" for layer in verdict.layers if layer.pin == "unpinned"]
    if children:
        named = ", ".join(children[:_NAMED])
        more = f" and {len(children) - _NAMED} more" if len(children) > _NAMED else ""
        lines.append(f"unpinned: no hash of their parents is recorded in {named}{more}")
    return lines
