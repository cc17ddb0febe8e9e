"""The pictures of `map` and `info`, as their options ask for them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import click

from diffmergefs.analysis.info import run_lengths
from diffmergefs.analysis.zeros import Piece
from diffmergefs.cli.output import print_diagnostic, printable, progress
from diffmergefs.core.view import MergedView
from diffmergefs.pictures.legend import Subject, short_names
from diffmergefs.pictures.picture import FORMATS, picture_format, publish

if TYPE_CHECKING:
    from diffmergefs.pictures.canvas import Picture


def picture_path(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    """Refuse the name of a picture that is not that of a PNG or an SVG file."""
    if value is not None and picture_format(value) is None:
        endings = " or ".join(f".{name}" for name in FORMATS)
        raise click.BadParameter(f"{printable(value)}: a picture's name ends with {endings}")
    return value


def draw_map(
    found: AbstractContextManager[Iterable[Piece]],
    view: MergedView,
    subject: Subject,
    layout: str,
    output: str,
    *,
    force: bool,
) -> None:
    """Write the map of the pieces that are `found` to `output`, once that can be written.

    Requires `require_matplotlib`, like all here.
    """
    from diffmergefs.pictures.map_picture import MapPicture

    def draw() -> bytes:
        with found as pieces:
            picture = MapPicture(pieces, subject, layout)
        return _drawn(picture, output)

    publish(output, view.layers, draw, force=force)
    print_diagnostic(f"{output}: written")


def draw_extents(view: MergedView, title: str, page: int, output: str, *, force: bool) -> None:
    """Write the histograms of the layers' extents to `output`."""
    from diffmergefs.pictures.extents_picture import ExtentsPicture

    def draw() -> bytes:
        names = [printable(name) for name in short_names([layer.path for layer in view.layers])]
        lengths = [run_lengths(layer.extents, page) for layer in view.layers]
        return _drawn(ExtentsPicture(title, names, lengths, page), output)

    publish(output, view.layers, draw, force=force)
    print_diagnostic(f"{output}: written")


def _drawn(picture: Picture, output: str) -> bytes:
    with progress("draw", unit=""):
        return picture.svg() if picture_format(output) == "svg" else picture.png()
