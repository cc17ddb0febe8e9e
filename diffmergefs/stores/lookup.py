"""What the stores know about a path that a user gives: an IMAGE, or explicit layers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from diffmergefs.core import beneath, foreign
from diffmergefs.core.errors import DiffMergeError, FileAccessError
from diffmergefs.core.failures import failures
from diffmergefs.stores.catalog import (
    LAYOUTS,
    READERS,
    SHALLOW_LAYOUTS,
    Catalog,
    StoreOptions,
    read_catalog,
)
from diffmergefs.stores.numbered import SUFFIXES, is_numbered
from diffmergefs.stores.reader import names_of, require_own_path
from diffmergefs.stores.remarks import listed, no_snapshot
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

    `path` is a snapshot's directory, its memory file in there, a numbered layer file, or `DIR/TAG`
    and `DIR/TAG/FILE` as in a view of the directory DIR. The catalog may lack the tag, and the
    tag's chain may be broken. Raises DiffMergeError where `path` names no image: for a directory of
    snapshots, with their names.
    """
    if not os.fspath(path):
        raise FileAccessError("'': an empty path names no image")
    image = os.path.abspath(path)
    image = os.path.realpath(image) if os.path.islink(image) else image
    with failures(os.fspath(path)), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(image)  # a stale mount, or a directory that may not be searched, is an error here
    if os.path.isdir(image):
        if (layout := layout_of(image)) is None:
            raise no_snapshot(os.fspath(path))
        root, name = os.path.split(image)
        return read_catalog(root, layout, options=options), name
    require_own_path(image)
    if found := _find_file(image, options) or _find_in_view(image, options):
        return found
    if not os.path.exists(image):
        raise FileAccessError(f"{os.fspath(path)}: No such file or directory{_beside(image)}")
    raise FileAccessError(
        f"{os.fspath(path)}: neither a snapshot directory nor a numbered layer (002-name.mem), nor"
        " the memory file of a snapshot; name its layers with --base and --diff"
    )


def _find_file(image: str, options: StoreOptions | None) -> tuple[Catalog, str] | None:
    # The memory file of a numbered layer, or in a snapshot's directory.
    if not os.path.isfile(image):
        return None
    folder, name = os.path.split(image)
    if is_numbered(name) and (found := _find_numbered(folder, name, options)):
        return found
    if layout := layout_of(folder):
        root, tag = os.path.split(folder)
        catalog = read_catalog(root, layout, options=options)
        if _has_memory(catalog, tag, image):
            return catalog, tag
    return None


def _has_memory(catalog: Catalog, tag: str, image: str) -> bool:
    memory = catalog.snapshots[tag].memory if tag in catalog.snapshots else None
    return memory is not None and os.path.realpath(
        os.path.join(catalog.root, memory.path)
    ) == os.path.realpath(image)


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


def _find_in_view(image: str, options: StoreOptions | None) -> tuple[Catalog, str] | None:
    # A path that exists only below a mount of the directory.
    if os.path.lexists(image):
        return None
    folder, name = os.path.split(image)
    for root, tag, file in ((folder, name, ""), (*os.path.split(folder), name)):
        if os.path.isdir(root):
            found = [c for c in _catalogs(root, "+" in tag, options) if _shows(c, tag, file)]
            if len(found) == 1:
                return found[0], tag
    return None


def _shows(catalog: Catalog, tag: str, file: str) -> bool:
    memory = catalog.snapshots[tag].memory if tag in catalog.snapshots else None
    return memory is not None and file in ("", os.path.basename(memory.path))


def _catalogs(root: str, is_deep: bool, options: StoreOptions | None) -> Iterator[Catalog]:
    # Without the deep layouts unless they are asked for: they could read a whole filesystem.
    for layout in LAYOUTS if is_deep else SHALLOW_LAYOUTS:
        with contextlib.suppress(OSError, DiffMergeError):
            yield read_catalog(root, layout, options=options)


def _beside(image: str) -> str:
    # What may have been meant: the snapshots in the directory of a path that does not exist.
    found = _catalogs(os.path.dirname(image), False, None)
    tags = sorted({s.tag for c in found for s in c.snapshots.values() if s.memory})
    return f"; the snapshots there are {listed(tags)}" if tags else ""


def find_store(
    path: str, layout: str | None, suffix: str | None, options: StoreOptions | None = None
) -> Catalog | None:
    """The catalog of `path` if it is a directory of snapshots; None if it is anything else.

    A directory that is a snapshot itself is none, unless a `layout` or a `suffix` is given. Raises
    BrokenChainError if there is no snapshot in the directory, and what `read_catalog` raises.
    """
    place = os.path.realpath(path)
    if not (layout or suffix) and (not os.path.isdir(place) or layout_of(place)):
        return None
    catalog = read_catalog(path, layout, suffix, options=options)
    if not catalog.snapshots:
        raise no_snapshot(path)
    return catalog


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory or something else that `find_image` may take.

    The directory of a file is read only if it is a snapshot's, or if the name could be a numbered
    layer's. Raises DiffMergeError where it cannot be read, or is ambiguous.
    """
    place = os.path.realpath(path)
    if os.path.isdir(place):
        return True
    return (_find_file(place, None) or _find_in_view(place, None)) is not None


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
