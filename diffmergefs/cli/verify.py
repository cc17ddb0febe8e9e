"""`verify`: check the layers of an image against everything recorded about them."""

from __future__ import annotations

import click

from diffmergefs.checks import verify as verification
from diffmergefs.checks.verdict import Verdict
from diffmergefs.cli.inputs import ImageArguments, image_options
from diffmergefs.cli.options import json_option, strict_option
from diffmergefs.cli.output import print_diagnostic, print_json, printable, progress

_NAMED = 8  # how many unpinned parents the summary names


@click.command()
@image_options
@strict_option
@click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Read N files at a time (default: one per processor).",
)
@json_option
def verify(
    source: ImageArguments,
    jobs: int | None,
    as_json: bool,
) -> int:
    """Check every layer of IMAGE against everything recorded about it. Print one line per fault.

    The checks cover the chain (missing parents, cycles), sizes, whether extents can be trusted,
    every seal and presence file, and the sha256 that each snapshot records of its parent
    (parent_content_hash). Everything is read again, even if it was verified before. A parent whose
    hash is not recorded is listed as unpinned; that is not a fault. The exit code is 0 if there is
    no fault, otherwise 1.

    Correct results are remembered, so that `diffmergefs mount` does not need to read the files.

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
    with opened, progress("verify", opened.total_bytes) as advance:
        verdict = opened.verify(advance, jobs)
    print_diagnostic(*verdict.overridden, *verdict.hints)
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
