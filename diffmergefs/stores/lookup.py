"""What the stores know about a path that a user gives: an IMAGE, or explicit layers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from diffmergefs.core import beneath, foreign
from diffmergefs.core.errors import FileAccessError
from diffmergefs.stores.catalog import READERS, Catalog, StoreOptions, read_catalog
from diffmergefs.stores.numbered import SUFFIXES, is_numbered
from diffmergefs.stores.reader import names_of, require_own_path
from diffmergefs.stores.snapshot import is_left_out


def require_mergeable(base: str, diffs: Sequence[str]) -> None:
    """Raise BrokenChainError if a store knows that these files are not a base and its diffs.

    `diffs` are oldest first. Reads what a store records beside the files; no image is opened.
    Raises FileAccessError if a file cannot be found.
    """
    for reader in READERS.values():
        reader.require_mergeable(base, diffs)


def find_image(
    path: str | os.PathLike[str], options: StoreOptions | None = None
) -> tuple[Catalog, str]:
    """The catalog of the directory in which the IMAGE `path` lies, and its tag there.

    `path` is a snapshot's directory or a numbered layer file. The catalog may lack the
    tag, and the tag's chain may be broken. Raises DiffMergeError where `path` names no image.
    """
    if not os.fspath(path):
        raise FileAccessError("'': an empty path names no image")
    image = os.path.abspath(path)
    image = os.path.realpath(image) if os.path.islink(image) else image
    root, name = os.path.split(image)
    if os.path.isdir(image):
        layout = layout_of(image) or "forkd"
        return read_catalog(root, layout, options=options), name
    require_own_path(image)
    if not os.path.exists(image):
        raise FileAccessError(f"{os.fspath(path)}: No such file or directory")
    if found := _find_numbered(root, name, options):
        return found
    raise FileAccessError(
        f"{os.fspath(path)}: neither a snapshot directory nor a numbered layer (002-name.mem);"
        " name its layers with --base and --diff"
    )


def _find_numbered(
    root: str, name: str, options: StoreOptions | None
) -> tuple[Catalog, str] | None:
    suffix = os.path.splitext(name)[1]
    # A file with one of the usual suffixes is a layer only if the lowest layer has that suffix.
    chosen = None if suffix in SUFFIXES else suffix or None
    catalog = read_catalog(root, "numbered", chosen, options=options)
    for tag, snapshot in catalog.snapshots.items():
        if snapshot.memory and snapshot.memory.path == name:
            return catalog, tag
    return None


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory or a numbered layer file, which `find_image` may take.

    The directory of a file is read only if the name could be a numbered layer's. Raises
    DiffMergeError where it cannot be read, or is ambiguous.
    """
    place = os.path.realpath(path)
    if os.path.isdir(place):
        return True
    root, name = os.path.split(place)
    return is_numbered(name) and _find_numbered(root, name, None) is not None


def layout_of(folder: str) -> str | None:
    """The layout in which the directory `folder` alone is a snapshot, or None.

    Raises ForeignFormatError if it is in a format that is declined.
    """
    try:
        parent = os.open(os.path.dirname(folder), os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    name = os.path.basename(folder)
    with beneath.closing_fd(parent) as fd:
        foreign.require_own_directory(names_of(fd, name), folder)
        for reader in READERS.values():
            with contextlib.suppress(OSError):
                if not is_left_out(name) and reader.is_tag(fd, name):
                    return reader.name
    return None
