"""The pictures of `map` and `info`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    """Refuse a file name for a picture that does not end in .png or .svg."""
    if value is not None and picture_format(value) is None:
        endings = " or ".join(f".{name}" for name in FORMATS)
        raise click.BadParameter(f"{printable(value)}: a picture's name must end in {endings}")
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
    """Write the map of the `found` pieces to `output`, after checking that it can be written.

    Requires `require_matplotlib`, like all functions here.
    """
    from diffmergefs.pictures.map_picture import MapPicture

    def make() -> Picture:
        with found as pieces:
            return MapPicture(pieces, subject, layout)

    _publish(output, view, make, force=force)


def draw_extents(view: MergedView, title: str, page: int, output: str, *, force: bool) -> None:
    """Write the histograms of the layers' extents to `output`."""
    from diffmergefs.pictures.extents_picture import ExtentsPicture

    def make() -> Picture:
        names = [printable(name) for name in short_names([layer.path for layer in view.layers])]
        lengths = [run_lengths(layer.extents, page) for layer in view.layers]
        return ExtentsPicture(title, names, lengths, page)

    _publish(output, view, make, force=force)


def _publish(output: str, view: MergedView, make: Callable[[], Picture], *, force: bool) -> None:
    def draw() -> bytes:
        picture = make()
        with progress("draw", unit=""):
            return picture.svg() if picture_format(output) == "svg" else picture.png()

    publish(output, view.layers, draw, force=force)
    print_diagnostic(f"{output}: written")
