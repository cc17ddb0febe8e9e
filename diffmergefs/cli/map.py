"""`map`: show which layer supplies which part of an image: as text, a picture or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import click

from diffmergefs.analysis import info
from diffmergefs.analysis.info import MapEntry
from diffmergefs.cli.inputs import ImageArguments, image_options
from diffmergefs.cli.options import Size
from diffmergefs.cli.output import printable, progress
from diffmergefs.cli.picture import draw_map, picture_options, require_matplotlib
from diffmergefs.cli.terminal import TerminalMap
from diffmergefs.cli.usage import Verb
from diffmergefs.core.view import MergedView
from diffmergefs.core.workers import Progress, ignore_progress
from diffmergefs.opening.images import Image
from diffmergefs.pictures.maps import Subject, short_names


def _range(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, int | None] | None:
    # START:END in bytes, decimal or 0x..., with K, M, G or T. Either may be left out.
    if value is None:
        return None
    start, colon, stop = value.partition(":")
    if not colon:
        raise click.BadParameter(f"{value!r} is not START:END")
    size = Size()
    low = size.convert(start, parameter, context) if start else 0
    return low, size.convert(stop, parameter, context) if stop else None


@click.command("map", cls=Verb)
@image_options
@picture_options("-o", "--output", description="Draw a picture, FILE.png or FILE.svg.")
@click.option(
    "--layout",
    type=click.Choice(["linear", "hilbert"]),
    help="Draw the picture row by row (linear, the default) or along a Hilbert curve.",
)
@click.option(
    "--range",
    "window",
    callback=_range,
    metavar="START:END",
    help="Only these bytes: decimal or 0x..., with K, M, G or T. You may leave out either one.",
)
@click.option("--zeros", "scan", is_flag=True, help="Read the data once to find written zeros.")
@click.option("--json", "as_json", is_flag=True, help="Print the ranges as JSON.")
def map_(
    source: ImageArguments,
    output: str | None,
    force: bool,
    layout: str | None,
    window: tuple[int, int | None] | None,
    scan: bool,
    as_json: bool,
) -> None:
    """Show which layer supplies which part of IMAGE.

    The terminal has a row for each layer. Each column shows how much of that part of the image
    comes from the layer, on a logarithmic scale that makes a single page visible. -o draws a
    picture and needs matplotlib. --json prints the ranges, like `qemu-img map --output=json`; depth
    0 is the newest layer. Only metadata is read, except with --zeros.

    \b
    Examples:
      diffmergefs map /srv/snapshots/pandas
      diffmergefs map --zeros --range 0x40000:1M --base mem_file --diff mem_diff
      diffmergefs map /srv/snapshots/pandas -o pandas.png
      diffmergefs map --json /srv/snapshots/pandas | jq '.[] | select(.depth == 0)'
    """
    if output is None and (force or layout):
        raise click.UsageError("--force and --layout need a picture: name it with -o")
    if output is not None and as_json:
        raise click.UsageError("--json and -o cannot be combined")
    if output is not None:
        require_matplotlib()
    with (found := source.open()).view as view:
        start, stop = _within(window, view.size)
        paths = [printable(layer.path) for layer in view.layers]
        names = [printable(name) for name in short_names([layer.path for layer in view.layers])]
        subject = Subject(
            source.title, names, view.size, start, stop, source.policy.page_size, scan
        )
        found_entries = _entries(view, subject, bar=not (as_json and sys.stdout.isatty()))
        if output is not None:
            draw_map(found_entries, view, subject, layout or "linear", output, force=force)
        elif as_json:
            with found_entries as entries:
                _print_ranges(entries, found)
        else:
            with found_entries as entries:
                rows = TerminalMap(entries, subject)
            rows.print(paths)


def _within(window: tuple[int, int | None] | None, size: int) -> tuple[int, int]:
    start, stop = window or (0, None)
    stop = size if stop is None else stop
    if not start < stop <= size:
        raise click.BadParameter(
            f"{start:#x}:{stop:#x} is not a range within the image's {size:#x} bytes",
            param_hint="--range",
        )
    return start, stop


@contextmanager
def _entries(view: MergedView, subject: Subject, *, bar: bool) -> Iterator[Iterable[MapEntry]]:
    # Without a progress bar if the output would run into it.
    start, stop = subject.start, subject.stop
    found = info.entries(view, start, stop)
    what, total = "map", stop - start
    if subject.scanned:
        what, total = "zeros", sum(p.stop - p.start for p in found if p.layer is not None)
    with progress(what, total) if bar else nullcontext(ignore_progress) as advance:
        if subject.scanned:
            yield info.scanned_entries(view, start, stop, subject.page, advance)
        else:
            yield _reported(found, advance)


def _reported(entries: Iterable[MapEntry], advance: Progress) -> Iterator[MapEntry]:
    for entry in entries:
        yield entry
        advance(entry.stop - entry.start)


def _print_ranges(entries: Iterable[MapEntry], image: Image) -> None:
    # One object per line, printed at once: there may be millions.
    before = "["
    newest = len(image.view.layers) - 1
    for start, stop, layer, zero in entries:
        present = layer is not None
        entry: dict[str, int | str] = {
            "start": start,
            "length": stop - start,
            # A hole in all layers has the base's depth, as in qemu-img.
            "depth": newest - (layer or 0),
            "present": present,
            "zero": zero,
            "data": present,
        }
        if layer is not None:
            entry |= {"offset": start, "layer": image.view.layers[layer].path}
        print(f"{before}{json.dumps(entry)}", end="")
        before = ",\n"
    print("]")
