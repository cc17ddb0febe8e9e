"""The pictures of `map` and `info`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import click

from diffmergefs.analysis.info import MapEntry, run_lengths
from diffmergefs.cli.options import PATH, F, all_of
from diffmergefs.cli.output import print_diagnostic, printable, progress
from diffmergefs.core.errors import MissingExtraError
from diffmergefs.core.failures import failures
from diffmergefs.core.identity import limit_read_bits
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.pictures.maps import Subject, short_names
from diffmergefs.system.installation import install_command
from diffmergefs.writing.output import OutputFile

if TYPE_CHECKING:
    from diffmergefs.pictures.canvas import Canvas


FORMATS = ("png", "svg")


def picture_format(path: str) -> str | None:
    """'png' or 'svg' by the end of the file's name; None if it is neither."""
    extension = os.path.splitext(path)[1].lower().removeprefix(".")
    return extension if extension in FORMATS else None


def require_matplotlib() -> None:
    """Import matplotlib and numpy, or raise MissingExtraError with the command that installs them.

    Afterwards the modules in `pictures` can be imported. During the import `/` is the current
    directory: matplotlib obeys any `matplotlibrc` in it, and a directory of snapshots may belong to
    anybody.
    """
    # Its messages about its caches are of no use to our users.
    logging.getLogger("matplotlib").addHandler(logging.NullHandler())
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir("/")
        import matplotlib.figure  # noqa: F401
        import numpy  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"pictures need matplotlib ({error}); install it: {install_command('matplotlib')}"
        ) from error
    finally:
        os.fchdir(here)
        os.close(here)


def picture_options(*names: str, description: str) -> Callable[[F], F]:
    """The option that names the file of a picture, and --force."""
    return all_of(
        click.option(*names, type=PATH, metavar="FILE", callback=_picture_path, help=description),
        click.option("--force", is_flag=True, help="Replace the picture atomically if it exists."),
    )


def _picture_path(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    if value is not None and picture_format(value) is None:
        endings = " or ".join(f".{name}" for name in FORMATS)
        raise click.BadParameter(f"{printable(value)}: a picture's name must end in {endings}")
    return value


def draw_map(
    found: AbstractContextManager[Iterable[MapEntry]],
    view: MergedView,
    subject: Subject,
    layout: str,
    output: str,
    *,
    force: bool,
) -> None:
    """Write the map of the `found` entries to `output`, after checking that it can be written.

    Requires `require_matplotlib`, like all functions here.
    """
    from diffmergefs.pictures.map_picture import MapPicture

    def make() -> Canvas:
        with found as entries:
            return MapPicture(entries, subject, layout)

    _publish(output, view, make, force=force)


def draw_extents(view: MergedView, title: str, page: int, output: str, *, force: bool) -> None:
    """Write the histograms of the layers' extents to `output`."""
    from diffmergefs.pictures.extents_picture import ExtentsPicture

    def make() -> Canvas:
        names = [printable(name) for name in short_names([layer.path for layer in view.layers])]
        lengths = [run_lengths(layer.extents, page) for layer in view.layers]
        return ExtentsPicture(title, names, lengths, page)

    _publish(output, view, make, force=force)


def _publish(output: str, view: MergedView, make: Callable[[], Canvas], *, force: bool) -> None:
    def draw() -> bytes:
        picture = make()
        with progress("draw", unit=""):
            return picture.svg() if picture_format(output) == "svg" else picture.png()

    publish(output, view.layers, draw, force=force)
    print_diagnostic(f"{output}: written")


def publish(
    path: str, layers: Collection[Layer], draw: Callable[[], bytes], *, force: bool = False
) -> None:
    """Write what `draw` returns to a new file `path`, which is whole or does not exist.

    `draw` is called only if the file can be created. The picture reveals something of the layers'
    contents, so other users may read it only if they may read every layer. Raises what OutputFile
    and `draw` raise; then the name has its old file, or none.
    """
    with OutputFile(path, [layer.status for layer in layers], force=force) as file:
        file.write(draw())
        with failures(path):
            mode = 0o600 | limit_read_bits(0o044, [layer.mode for layer in layers])
        file.finish(mode)
        file.publish()
