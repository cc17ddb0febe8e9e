"""The interface of the readers of directories of snapshots: one reader for each layout.

docs/adding-a-store.md shows how to write the next one.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

from diffmergefs.core import beneath, foreign
from diffmergefs.core.beneath import AllowedRoots, Root
from diffmergefs.core.errors import DiffMergeError, FileAccessError
from diffmergefs.stores.snapshot import Snapshot, is_left_out, key_of, version_of


@dataclass(frozen=True)
class Source:
    """A directory of snapshots, as a reader gets it.

    `path` is the directory as given, for messages. Open all files by `root` and the functions of
    `beneath`. `statuses` has the lstat of each name, except those in `refused`, for which only the
    file type (0 if unknown) and the reason are known. `suffix` is the suffix of memory files, if
    the user chose one. With `allow_gaps` numbered layers may leave numbers out.
    """

    path: str
    root: AllowedRoots
    statuses: Mapping[str, os.stat_result]
    suffix: str | None = None
    allow_gaps: bool = False
    refused: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @cached_property
    def kinds(self) -> dict[str, int]:
        """The file type of each name (`stat.S_IFDIR` and the like)."""
        seen = {name: stat.S_IFMT(status.st_mode) for name, status in self.statuses.items()}
        return seen | {name: kind for name, (kind, _) in self.refused.items()}

    @cached_property
    def folders(self) -> list[str]:
        """The names that are directories, or may be directories."""
        return [name for name, kind in self.kinds.items() if kind in (stat.S_IFDIR, 0)]

    @cached_property
    def paths(self) -> frozenset[str]:
        """The absolute paths by which a snapshot may have recorded this directory."""
        return frozenset({os.path.abspath(self.path), os.path.realpath(self.path)})


class Reader(ABC):
    """Reads one layout, which `--layout` calls `name`.

    All methods read metadata only: no image file is opened.
    """

    name: str
    #: The files by which it is recognized, for a message: `TAG/snapshot.json`.
    marks: str
    #: Whether `read` lists directories inside the directories of the source.
    is_deep = False

    @abstractmethod
    def finds(self, source: Source) -> bool:
        """Whether anything in the directory looks like this layout, complete or not.

        Raises BrokenChainError if it does but is ambiguous.
        """

    @abstractmethod
    def is_tag(self, root: Root, name: str) -> bool:
        """Whether the directory `name` beneath `root` alone is a snapshot of this layout.

        Raises OSError if that is unknown.
        """

    @abstractmethod
    def read(self, source: Source) -> dict[str, Snapshot]:
        """All snapshots by tag. Broken ones have a `problem`; none is left out.

        Raises OSError and BrokenChainError only if the directory as a whole cannot be read.
        """

    def require_mergeable(self, base: str, diffs: Sequence[str]) -> None:
        """Raise BrokenChainError if explicit files of this layout cannot be merged.

        `base` and `diffs` (oldest first) are paths. Files of other layouts pass, and by default all
        files do. Raises FileAccessError if a file cannot be found.
        """
        return


class FolderReader(Reader):
    """A reader for layouts with one directory per snapshot, named by its tag.

    A subclass has a `name`, and implements `is_tag` and `describe`. In a tag's directory, the
    snapshot is read from the files named in `documents`, and the files named in `device_state`
    belong to exactly the memory beside them. Other files may change at any time.
    """

    documents: tuple[str, ...] = ()
    device_state: tuple[str, ...] = ()

    @abstractmethod
    def describe(self, source: Source, tag: str, seen: Snapshot) -> Snapshot:
        """The snapshot in the directory `tag`.

        `seen` has its folder, documents and device state. Return it with everything else that is
        known (`dataclasses.replace`). A DiffMergeError or OSError becomes the snapshot's problem.
        """

    def finds(self, source: Source) -> bool:
        """Whether any directory is a tag. One that cannot be read is not."""
        return any(self._is_surely_tag(source.root, name) for name in source.folders)

    def read(self, source: Source) -> dict[str, Snapshot]:
        """The snapshots in the source's directories.

        A directory that cannot be read is a broken snapshot; so is one in a declined format.
        """
        found = ((name, self.read_folder(source, name)) for name in source.folders)
        return {name: snapshot for name, snapshot in found if snapshot}

    def read_folder(self, source: Source, path: str) -> Snapshot | None:
        """The snapshot in the directory `path` beneath the source, if it is one."""
        if is_left_out(os.path.basename(path)):
            return None
        seen = Snapshot(path)
        try:
            is_tag = self.is_tag(source.root, path)
            names = listed_names(source.root, path) if is_tag else names_of(source.root, path)
            if declined := foreign.of_directory(names):
                return replace(seen, problem=f"{path}: {declined}")
            if not is_tag:
                return None
            seen = replace(seen, folder=path)
            # Before they are read, so a write in between shows as a change in the next catalog.
            documents = {p: key_of(source.root, p) for p in _within(path, self.documents)}
            states = {p: version_of(source.root, p) for p in _within(path, self.device_state)}
            known = {p: key for p, key in documents.items() if key}
            seen = replace(seen, documents=known, device_state=states)
            return self.describe(source, path, seen)
        except DiffMergeError as error:
            return replace(seen, problem=str(error))
        except OSError as error:
            return replace(seen, problem=f"{path}: {error.strerror}")

    def _is_surely_tag(self, root: Root, name: str) -> bool:
        # A directory that cannot be read (such as lost+found) says nothing about the layout.
        try:
            return not is_left_out(name) and self.is_tag(root, name)
        except OSError:
            return False


def _within(path: str, names: Iterable[str]) -> list[str]:
    return [f"{path}/{name}" for name in names]


def open_source(path: str, at: int | None = None) -> int:
    """A new descriptor of the directory `path`, or of the directory that `at` is open on.

    Raises FileAccessError, and ForeignFormatError for a file of a format that is declined.
    """
    try:
        return os.open(path if at is None else ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=at)
    except NotADirectoryError as error:
        require_own_path(path)
        raise FileAccessError(
            f"{path}: a file, not a directory of snapshots; mount, info and flatten take single"
            " files with --base and --diff"
        ) from error
    except OSError as error:
        raise FileAccessError(f"{path}: {error.strerror}") from error


def require_own_path(path: str) -> None:
    """`foreign.require_own_file` for a path. Anything but a readable regular file passes."""
    with (
        suppress(OSError, FileAccessError),
        beneath.closing_fd(beneath.open_regular(None, path)) as fd,
    ):
        foreign.require_own_file(fd, path)
        foreign.require_own_neighbours(path)


def names_of(root: Root, path: str) -> frozenset[str]:
    """The names in the directory `path` beneath `root`; none if it cannot be listed."""
    try:
        return listed_names(root, path)
    except OSError:
        return frozenset()


def has_file(root: Root, path: str) -> bool:
    """Whether anything exists at `path` beneath `root`.

    Raises OSError if that is unknown: a diff whose record is hidden must not become a base.
    """
    try:
        beneath.stat_beneath(root, path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def listed_names(root: Root, path: str) -> frozenset[str]:
    """The names in the directory `path` beneath `root`. Raises OSError."""
    with beneath.closing_fd(beneath.open_directory(root, path)) as fd:
        return frozenset(os.listdir(fd))
