"""What a directory of snapshots holds beside them, and what it holds instead if it has none."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from diffmergefs.core import beneath, foreign
from diffmergefs.core.errors import (
    BrokenChainError,
    DiffMergeError,
    counted,
    one_line,
)
from diffmergefs.stores.catalog import READERS, SHALLOW_LAYOUTS, Catalog, read_catalog
from diffmergefs.stores.numbered import is_numbered
from diffmergefs.stores.reader import listed_names, open_source
from diffmergefs.stores.snapshot import Snapshot, is_left_out

_MOST_LINES = 20
_MOST_FOLDERS = 50  # how many are looked into
_MOST_FILES = 1000
_NAMED = 8  # how many names a line has
_FCVM = {"memory.bin", "vmstate.bin", "config.json"}
# The parts of names that VMMs and their users give to memory files and to device state.
_MEMORY = {"mem", "memory", "memfile", "ram", "vmem"}
_STATE = {"vmstate", "state", "snapshot", "snapfile", "snap"}
_OTHERS = (".json", ".txt", ".md", ".log", ".sh", ".py", ".yaml", ".toml", ".conf", ".bmap")
_NAME_THEM = (
    "name them instead, as in `diffmergefs mount --base FULL --diff DIFF MOUNTPOINT`, oldest first"
)


class Found(NamedTuple):
    """What a directory holds, and what a user can do with it."""

    what: str
    remedy: str


def require_store(catalog: Catalog) -> None:
    """Raise BrokenChainError if the directory that was read is itself a snapshot, and has none."""
    if _has_any(catalog):
        return
    with beneath.closing_fd(open_source(catalog.root)) as fd, suppress(OSError):
        layouts = [reader.name for reader in READERS.values() if reader.is_tag(fd, ".")]
        if layouts:
            above = os.path.dirname(os.path.abspath(catalog.root))
            raise BrokenChainError(
                f"{catalog.root}: is one snapshot (layout {layouts[0]}), not a directory of them;"
                f" mount or list its parent directory, {above}"
            )


def remarks(catalog: Catalog, layout: str | None = None) -> list[str]:
    """Lines about what the directory that was read holds beside its snapshots.

    There is a line for each symlink and each directory that is passed over, and for each numbered
    memory file that is no layer: at most twenty, and one that counts the rest. Hidden names are
    left out. If there is no snapshot, the first line says which layouts (or only `layout`) were
    looked for, what is there instead, and what to do. Reads names, and the beginnings of files.
    Raises FileAccessError if the directory cannot be read any more.
    """
    with beneath.closing_fd(open_source(catalog.root)) as fd:
        kinds = _kinds(fd)
        if not _has_any(catalog):
            return [_nothing(catalog.root, fd, kinds, layout)]
        passed = _passed_over(catalog, kinds)
        lines = [_remark(catalog, fd, name, kinds[name]) for name in passed[:_MOST_LINES]]
    if rest := len(passed) - len(lines):
        lines.append(f"{catalog.root}: {counted(rest, 'other name')} in it passed over")
    return lines


def no_snapshot(path: str) -> BrokenChainError:
    """The error for a directory that is given as a snapshot, but is none.

    It names the snapshots in it, if there are any, or what it holds instead. Raises FileAccessError
    if it cannot be read, and other errors of `read_catalog`.
    """
    catalog = read_catalog(path)
    if _has_any(catalog):
        tags = [os.path.join(path, tag) for tag in sorted(catalog.snapshots)]
        return BrokenChainError(
            f"{path}: is a directory of {counted(len(tags), 'snapshot')}, not one of them; name"
            f" one: {listed(tags)}"
        )
    with beneath.closing_fd(open_source(path)) as fd:
        what, remedy = _instead(path, fd, _kinds(fd))
    return BrokenChainError(
        f"{path}: is neither a snapshot nor a directory of snapshots: {what}; {remedy}"
    )


def listed(names: Collection[str]) -> str:
    """The first of these names, and how many more there are."""
    first = list(names)[:_NAMED]
    more = len(names) - len(first)
    return ", ".join(map(one_line, first)) + (f" and {more} more" if more else "")


def _has_any(catalog: Catalog) -> bool:
    # A directory that cannot be read, or is in a declined format, may be anything.
    found = catalog.snapshots.values()
    return any(s.folder or s.memory or catalog.layout == "numbered" for s in found)


def _kinds(fd: int) -> dict[str, int]:
    found = {}
    with os.scandir(fd) as entries:
        for entry in entries:
            with suppress(OSError):
                found[entry.name] = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
    return dict(sorted(found.items()))


def _nothing(path: str, fd: int, kinds: Mapping[str, int], layout: str | None) -> str:
    readers = [READERS[layout]] if layout else READERS.values()
    looked_for = ", ".join(f"{reader.name} ({reader.marks})" for reader in readers)
    what, remedy = _instead(path, fd, kinds)
    return f"{path}: no snapshots: {what}; {remedy}; looked for {looked_for}"


def _instead(path: str, fd: int, kinds: Mapping[str, int]) -> Found:
    with suppress(DiffMergeError):
        if _has_any(found := read_catalog(path)):
            remedy = "leave out --layout and --suffix"
            return Found(f"it has snapshots of the layout {found.layout}", remedy)
    folders = [name for name, kind in kinds.items() if kind == stat.S_IFDIR and _is_shown(name)]
    looks = (_files(path, fd, kinds), _inner(path, fd, folders), _linked(path, kinds))
    if seen := next(filter(None, looks), None):
        return seen
    what = (
        f"it holds {counted(len(kinds), 'other name')} ({listed(kinds)})"
        if kinds
        else "it is empty"
    )
    return Found(what, "give the directory in which snapshots are made, if it is another")


def _files(path: str, fd: int, kinds: Mapping[str, int]) -> Found | None:
    # What the names and the beginnings of the files in one directory tell.
    files = [name for name, kind in kinds.items() if kind == stat.S_IFREG][:_MOST_FILES]
    if _FCVM.issubset(files):
        image = os.path.join(path, "memory.bin")
        return Found("a snapshot of fcvm, whose memory.bin is complete", f"name it: --base {image}")
    if declined := {name: text for name in files if (text := _declined(fd, name))}:
        kinds_of = [f"{name} {re.split('[:,;]', text)[0]}" for name, text in declined.items()]
        return Found(listed(kinds_of), next(iter(declined.values())).partition("; ")[2])
    if numbered := [name for name in files if is_numbered(name) and not is_left_out(name)]:
        suffix = os.path.splitext(numbered[0])[1]
        return Found(
            f"numbered files with other suffixes ({listed(numbered)})",
            f"choose the memory files' with --suffix, as in --suffix {suffix or '.mem'}",
        )
    memory = [name for name in files if _parts(name) & _MEMORY]
    state = [name for name in files if _parts(name) & _STATE and name not in memory]
    if not memory:
        return None
    what = "snapshot files of Firecracker" if state else "memory files"
    return Found(f"{what} ({listed([*memory, *state])})", _NAME_THEM)


def _declined(fd: int, name: str) -> str | None:
    with suppress(OSError, DiffMergeError), beneath.closing_fd(beneath.open_regular(fd, name)) as f:
        return foreign.of_head(os.pread(f, foreign.HEAD, 0))
    return None


def _parts(name: str) -> set[str]:
    return set() if name.endswith(_OTHERS) else set(re.split(r"[._-]", name.lower()))


def _inner(path: str, fd: int, folders: list[str]) -> Found | None:
    # Directories of snapshots, or other things, one level down.
    kinds: dict[str, list[str]] = {}
    remedies: dict[str, str] = {}
    for name in folders[:_MOST_FOLDERS]:
        inner = os.path.join(path, name)
        try:
            found = _look_into(inner, fd, name)
            # Not in a deep layout: that could read a whole filesystem.
            if any(_has_any(read_catalog(inner, layout)) for layout in SHALLOW_LAYOUTS):
                return Found(f"they are one level down, in {inner}", "give that directory")
        except PermissionError:
            found = Found("what cannot be read", "give a directory that this user can read")
        except OSError:
            continue
        except DiffMergeError:
            pass
        if found is not None:
            what = re.split(r" \(|[:,]", found.what)[0]
            kinds.setdefault(what, []).append(name)
            remedies.setdefault(what, found.remedy)
    for what, names in kinds.items():
        return Found(f"directories with {what} ({listed(names)})", remedies[what])
    return None


def _look_into(path: str, fd: int, name: str) -> Found | None:
    with beneath.closing_fd(beneath.open_directory(fd, name)) as inner:
        kinds = _kinds(inner)
        if declined := foreign.of_directory(kinds):
            what, _, remedy = declined.partition("; ")
            return Found(what.removeprefix("is "), remedy)
        return _files(path, inner, kinds)


def _linked(path: str, kinds: Mapping[str, int]) -> Found | None:
    links = [name for name, kind in kinds.items() if kind == stat.S_IFLNK]
    if not links:
        return None
    return Found(
        f"symlinks ({listed(links)}), and none inside SOURCE is followed",
        f"give the directory that they lead into, as {os.path.dirname(_target(path, links[0]))}",
    )


def _target(path: str, name: str) -> str:
    place = os.path.join(path, name)
    with suppress(OSError):
        return os.path.normpath(os.path.join(path, os.readlink(place)))
    return place


def _passed_over(catalog: Catalog, kinds: Mapping[str, int]) -> list[str]:
    # By name and kind alone: there may be thousands.
    used = set(_used(catalog.snapshots.values()))

    def is_remarkable(name: str, kind: int) -> bool:
        if kind == stat.S_IFDIR:
            return True
        return not is_left_out(name) if _has_number(catalog, name) else kind == stat.S_IFLNK

    shown = ((name, kind) for name, kind in kinds.items() if name not in used and _is_shown(name))
    return [name for name, kind in shown if is_remarkable(name, kind)]


def _has_number(catalog: Catalog, name: str) -> bool:
    return catalog.layout == "numbered" and is_numbered(name)


def _remark(catalog: Catalog, fd: int, name: str, kind: int) -> str:
    path = os.path.join(catalog.root, name)
    if kind == stat.S_IFDIR:
        return f"{path}: passed over: {_directory(path, fd, name, catalog.layout)}"
    if kind == stat.S_IFLNK and not _has_number(catalog, name):
        return (
            f"{path}: passed over: a symlink to {_target(catalog.root, name)}; none inside"
            " SOURCE is followed: move the directory here, or bind-mount it"
        )
    return (
        f"{path}: passed over: other memory files here have another suffix, or its number;"
        " rename it, or choose a suffix with --suffix"
    )


def _directory(path: str, fd: int, name: str, layout: str) -> str:
    if is_left_out(name):
        return "a temporary name"
    try:
        listed_names(fd, name)
        for reader in READERS.values():
            if reader.is_tag(fd, name):
                return f"a snapshot of the layout {reader.name}, which --layout chooses"
        found = _look_into(path, fd, name)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return f"{found.what}; {found.remedy}" if found else f"no snapshot of the layout {layout}"


def _used(snapshots: Iterable[Snapshot]) -> Iterator[str]:
    for snapshot in snapshots:
        paths = [snapshot.tag, snapshot.tag.partition("+")[0], snapshot.folder or ""]
        paths += [*snapshot.files.values(), *snapshot.withheld, *snapshot.device_state]
        if snapshot.memory is not None:
            paths.append(snapshot.memory.path)
        yield from (path.partition("/")[0] for path in paths)


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name != "lost+found"
