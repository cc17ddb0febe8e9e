"""superserve's snapshots: a template's `mem.snap`, and a sandbox's `mem.diff` over it.

Beside a `mem.diff` are `mem.diff.base`, the absolute path of its base image, and
`mem.diff.presence`, the bitmap of its pages. Directories lie at several depths below superserve's
snapshot directory (`templates/<id>`, `templates/<id>/build-<id>`, `<sandbox>`, `<sandbox>/<id>`).
Source: github.com/superserve-ai/sandbox, internal/vm/manager.go, internal/presence.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace

from diffmergefs.core import beneath
from diffmergefs.core.beneath import Root
from diffmergefs.core.errors import BrokenChainError, FileAccessError, PresenceError
from diffmergefs.sidecars import presence
from diffmergefs.sidecars.presence import PRESENCE_SUFFIX
from diffmergefs.stores.document import MAX_PATH, OUTSIDE, beneath_source, is_reachable
from diffmergefs.stores.reader import FolderReader, Source, has_file
from diffmergefs.stores.snapshot import (
    DOCUMENT,
    Snapshot,
    StoredFile,
    find_layer,
    is_left_out,
    read_small,
)

FULL = "mem.snap"
DIFF = "mem.diff"
BASE_SUFFIX = ".base"

_DEPTH = 3
_SEPARATOR = "+"


class SuperserveReader(FolderReader):
    """Directories with a `mem.snap` or a `mem.diff`, down to three levels below the source.

    A tag is the path below the source with `+` for `/`. A base outside the source that the user
    allows is a snapshot too.
    """

    name = "superserve"
    marks = f"{FULL} or {DIFF} up to three directories down"
    is_deep = True
    documents = (DIFF + BASE_SUFFIX,)
    device_state = ("vmstate.snap",)

    def is_tag(self, root: Root, name: str) -> bool:
        if has_file(root, f"{name}/{DOCUMENT}"):
            return False  # the document says what it holds
        return has_file(root, f"{name}/{FULL}") or has_file(root, f"{name}/{DIFF}")

    def finds(self, source: Source) -> bool:
        return any(self._is_surely_tag(source.root, path) for path in _paths(source))

    def read(self, source: Source) -> dict[str, Snapshot]:
        found: dict[str, Snapshot] = {}
        for path in _paths(source):
            if snapshot := self.read_folder(source, path):
                tag = tag_of(snapshot.tag)
                known = found.get(tag)
                found[tag] = _two_of(tag, known, snapshot) if known else replace(snapshot, tag=tag)
        return _with_parents(source.root, found)

    def describe(self, source: Source, tag: str, seen: Snapshot) -> Snapshot:
        full = find_layer(source.root, f"{tag}/{FULL}")
        diff = find_layer(source.root, f"{tag}/{DIFF}", is_diff=True)
        if diff is None:
            return replace(seen, memory=full)
        withheld = frozenset({diff.path + BASE_SUFFIX, diff.path + PRESENCE_SUFFIX})
        found = replace(seen, memory=diff, withheld=withheld)
        try:
            # The path of the base is in place of its tag until all snapshots are known.
            found = replace(found, parent=_recorded_base(source, diff))
            if full is not None:
                raise BrokenChainError(
                    f"{tag}: holds {FULL} and {DIFF}, and only superserve knows which is current;"
                    " remove the other, or name the layers with --base and --diff"
                )
            _require_presence(source.root, diff)
        except (BrokenChainError, PresenceError, FileAccessError) as error:
            found = replace(found, problem=str(error))
        except OSError as error:  # for instance of a base outside the source
            found = replace(found, problem=f"{tag}: {error.strerror}")
        return found

    def require_mergeable(self, base: str, diffs: Sequence[str]) -> None:
        """Raise BrokenChainError if `base` is a `mem.diff` that has a base itself."""
        real = os.path.realpath(base)
        if os.path.basename(real) == DIFF and os.path.lexists(real + BASE_SUFFIX):
            raise BrokenChainError(
                f"{base}: is a diff, and {real}{BASE_SUFFIX} names its base image;"
                " give that one with --base, and this one with --diff"
            )


def _two_of(tag: str, one: Snapshot, other: Snapshot) -> Snapshot:
    # Neither can be mounted, and the layer of neither is passed through.
    problem = f"{one.folder or tag} and {other.tag} have the same tag, {tag!r}; rename one of them"
    layers = {s.memory.path for s in (one, other) if s.memory}
    return Snapshot(tag, problem=problem, withheld=one.withheld | other.withheld | layers)


def tag_of(path: str) -> str:
    """The tag of the snapshot in the directory `path`, beneath the source or absolute."""
    return path.strip("/").replace("/", _SEPARATOR)


def _paths(source: Source) -> Iterator[str]:
    for name in source.folders:
        yield from _folders(source.root, name)


def _folders(root: Root, path: str, depth: int = _DEPTH) -> Iterator[str]:
    # The directory `path` and those below it; one that cannot be listed has none below it.
    if is_left_out(os.path.basename(path)):
        return
    yield path
    try:
        if depth == 1 or has_file(root, f"{path}/{DOCUMENT}"):
            return
        opened = beneath.closing_fd(beneath.open_directory(root, path))
        with opened as fd, os.scandir(fd) as entries:
            names = sorted(entry.name for entry in entries if _may_be_folder(entry))
    except OSError:
        return
    for name in names:
        yield from _folders(root, f"{path}/{name}", depth - 1)


def _may_be_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return True  # reading it will tell


def _recorded_base(source: Source, diff: StoredFile) -> str:
    # The path of a diff's base image, beneath the source or allowed. A file of the same name
    # elsewhere does not do: a sandbox's own mem.snap is not its template's.
    record = diff.path + BASE_SUFFIX
    if not has_file(source.root, record):
        raise BrokenChainError(
            f"{record}: is missing, and nothing else names the base of {diff.path}"
        )
    recorded = os.fsdecode(read_small(source.root, record, MAX_PATH)).strip()
    if not recorded.startswith("/") or ".." in recorded.split("/") or "\0" in recorded:
        raise BrokenChainError(f"{record}: {recorded!r} is not an absolute path")
    path = beneath_source(recorded, source.paths)
    if not is_reachable(source.root, path) or not has_file(source.root, path):
        raise BrokenChainError(
            f"{record}: the base {recorded!r} is not at that path beneath {source.path}"
            + (OUTSIDE if path.startswith("/") else "")
        )
    return path


def _require_presence(root: Root, diff: StoredFile) -> None:
    # What metadata show: the sentinels of a save that failed. Opening the file checks the rest.
    path = diff.path + PRESENCE_SUFFIX
    keys = [key for suffix, key in diff.records if suffix == PRESENCE_SUFFIX]
    if not keys:
        raise PresenceError(
            f"{path}: is missing, so it is unknown which pages of {diff.path} hold data; copy it"
            " too, or vouch for the diff's holes with --base and --diff"
        )
    if not stat.S_ISREG(beneath.stat_beneath(root, path).st_mode):
        raise PresenceError(f"{path}: is not a regular file; nothing else is read")
    if keys[0].size <= 1:
        presence.parse(read_small(root, path, 1), path)


def _with_parents(root: Root, found: dict[str, Snapshot]) -> dict[str, Snapshot]:
    # Replaces the paths of parents by their tags.
    tags = {s.memory.path: tag for tag, s in found.items() if s.memory is not None}
    linked = dict(found)
    for tag, snapshot in found.items():
        path = snapshot.parent
        if path is None:
            continue
        parent = tags.get(path) or tag_of(path)
        linked[tag] = replace(snapshot, parent=parent)
        if parent not in linked:
            linked[parent] = _lone_base(root, path, parent)
        known = linked[parent]
        if snapshot.problem is None and known.memory is not None and known.memory.path != path:
            problem = (
                f"{path} and {known.memory.path} have the same tag, {parent!r}; rename one of them"
            )
            linked[tag] = replace(linked[tag], problem=problem)
    return linked


def _lone_base(root: Root, path: str, tag: str) -> Snapshot:
    try:
        memory = find_layer(root, path)
        if memory is None or os.path.basename(path) == DIFF:
            raise BrokenChainError(f"{path}: is used as a base, but is not a complete image")
        return Snapshot(tag, None, memory)
    except BrokenChainError as error:
        return Snapshot(tag, problem=str(error))
