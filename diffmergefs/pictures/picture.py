"""Pictures as files: matplotlib when it is needed, and an output that is whole or not there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection

from diffmergefs.core.errors import MissingExtraError
from diffmergefs.core.failures import failures
from diffmergefs.core.identity import limit_read_bits
from diffmergefs.core.layer import Layer
from diffmergefs.writing.output import OutputFile

FORMATS = ("png", "svg")


def picture_format(path: str) -> str | None:
    """'png' or 'svg' by the end of the file's name; None if it is neither."""
    extension = os.path.splitext(path)[1].lower().removeprefix(".")
    return extension if extension in FORMATS else None


def require_matplotlib() -> None:
    """Import matplotlib and numpy, or raise MissingExtraError with the command that installs them.

    The modules that draw can be imported afterwards. Meanwhile `/` is the process's current
    directory: matplotlib obeys any `matplotlibrc` that lies in it, and a directory of snapshots may
    be anybody's.
    """
    # What it says of its caches is no talk of ours.
    logging.getLogger("matplotlib").addHandler(logging.NullHandler())
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir("/")
        import matplotlib.figure  # noqa: F401
        import numpy  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"pictures need matplotlib ({error}): pip install 'diffmergefs[plot]'"
        ) from error
    finally:
        os.fchdir(here)
        os.close(here)


def publish(
    path: str, layers: Collection[Layer], draw: Callable[[], bytes], *, force: bool = False
) -> None:
    """Write what `draw` returns to a new file `path`, which is whole or not there at all.

    `draw` is called once it is known that the file can be made. It shows something of what is in
    the layers, so others may read it only if they may read every layer. Raises what OutputFile
    raises: OutputRefusedError (it exists without `force`, or is a layer), NoSpaceError,
    FileAccessError; and what `draw` does. Then nothing is left under the name, or what was there.
    """
    with OutputFile(path, [layer.status for layer in layers], force=force) as file:
        file.write(draw())
        with failures(path):
            mode = _mode(layers)
        file.finish(mode)
        file.publish()


def _mode(layers: Collection[Layer]) -> int:
    return 0o600 | limit_read_bits(0o044, [layer.mode for layer in layers])
