"""Numbered layers: 000-base.mem, 001-numpy.mem, ...: the chain is the numeric order."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from diffmergefs.core.beneath import Root
from diffmergefs.core.errors import BrokenChainError
from diffmergefs.core.identity import FileKey, FileVersion
from diffmergefs.sidecars.bmap import SEAL_SUFFIX
from diffmergefs.stores.reader import Reader, Source
from diffmergefs.stores.snapshot import RECORDS, Snapshot, StoredFile, is_left_out

ALLOW_GAPS = "--allow-gaps"
SUFFIXES = (".mem", ".bin", ".img")
_NUMBERED = re.compile(r"(?P<number>[0-9]+)-(?P<stem>.+)", re.DOTALL)


class NumberedFile(NamedTuple):
    """A file name taken apart: `007-work.mem` is number 7, stem 'work', suffix '.mem'."""

    name: str
    number: int
    stem: str
    suffix: str


def is_numbered(name: str) -> bool:
    """Whether a file of this name could be a numbered layer."""
    return _NUMBERED.fullmatch(name) is not None


def memory_files(kinds: Mapping[str, int], suffix: str | None = None) -> list[NumberedFile]:
    """The memory files among the names of `kinds` (name -> file type), in numeric order.

    Their suffix is `suffix`, or that of the memory file with the lowest number. A symlink or FIFO
    of such a name counts; a directory and a seal never do. Raises BrokenChainError for two memory
    files with the same number or stem.
    """
    suffixes = (_dotted(suffix),) if suffix else SUFFIXES
    candidates = [
        f
        for f in _numbered(kinds)
        if f.suffix in suffixes and f.suffix not in RECORDS and kinds[f.name] != stat.S_IFDIR
    ]
    if not candidates:
        return []
    lowest = candidates[0]
    _refuse_pairs([f for f in candidates if f.number == lowest.number], "number")
    found = [f for f in candidates if f.suffix == lowest.suffix]
    _refuse_pairs(found, "number")
    _refuse_pairs(found, "stem")
    return found


class NumberedReader(Reader):
    """The numeric order is the chain. Each layer is a tag, named by the stem after the number."""

    name = "numbered"
    marks = "000-TAG.mem"

    def finds(self, source: Source) -> bool:
        return bool(memory_files(source.kinds, source.suffix))

    def is_tag(self, root: Root, name: str) -> bool:
        return False  # its snapshots are files

    def read(self, source: Source) -> dict[str, Snapshot]:
        """The snapshots by tag.

        A file with the same number and another suffix belongs to a layer, except one that could be
        memory itself: it has one of SUFFIXES and the layer's size. Unless the source allows gaps, a
        layer whose number does not follow the one below is broken, and a lowest number other than 0
        gives that layer a doubt.
        """
        layers = memory_files(source.kinds, source.suffix)
        files: dict[int, list[NumberedFile]] = {layer.number: [] for layer in layers}
        for file in _numbered(source.kinds):
            if file.number in files:
                files[file.number].append(file)
        snapshots: dict[str, Snapshot] = {}
        below: NumberedFile | None = None
        for layer in layers:
            snapshots[layer.stem] = _snapshot(source, layer, below, files[layer.number])
            below = layer
        return snapshots


def _snapshot(
    source: Source, layer: NumberedFile, below: NumberedFile | None, files: list[NumberedFile]
) -> Snapshot:
    # `files` are those with its number, itself included.
    seen = {f.name: source.statuses[f.name] for f in files if f.name in source.statuses}
    problem, doubt = _fault(source, layer, below, files)
    found = Snapshot(layer.stem, below and below.stem, problem=problem, doubt=doubt)
    if layer.name not in seen:
        return found
    beside = [f for f in files if f.name in seen and f != layer]
    names = [f.name for f in beside if not _looks_like_memory(f, layer, seen)]
    suffixes = (SEAL_SUFFIX,) if below is None else RECORDS
    records = {
        (suffix, FileKey.of(seen[layer.name + suffix]))
        for suffix in suffixes
        if layer.name + suffix in seen
    }
    memory = StoredFile(layer.name, FileKey.of(seen[layer.name]), frozenset(records))
    sidecars = {layer.name + suffix for suffix in RECORDS}
    return replace(
        found,
        memory=memory if stat.S_ISREG(seen[layer.name].st_mode) else None,
        files={name: name for name in names},
        device_state={
            name: FileVersion.of(seen[name])
            for name in names
            if name not in sidecars and not stat.S_ISDIR(seen[name].st_mode)
        },
    )


def _fault(
    source: Source, layer: NumberedFile, below: NumberedFile | None, files: list[NumberedFile]
) -> tuple[str | None, str | None]:
    # Its problem, and its doubt (is it a base?).
    for file in files:
        kind, reason = source.refused.get(file.name, (stat.S_IFDIR, ""))
        if kind != stat.S_IFDIR:
            return f"{file.name}: {reason}", None
    if source.kinds[layer.name] != stat.S_IFREG:
        return f"{layer.name}: is not a regular file", None
    if source.allow_gaps:
        return None, None
    return (None, _doubt(layer.number)) if below is None else (_gap(below, layer), None)


def _numbered(kinds: Mapping[str, int]) -> list[NumberedFile]:
    files = []
    for name in kinds:
        match = _NUMBERED.fullmatch(name)
        if match is None or is_left_out(name):
            continue
        stem, suffix = os.path.splitext(match["stem"])
        files.append(NumberedFile(name, int(match["number"]), stem, suffix))
    return sorted(files, key=lambda f: (f.number, f.name))


def _gap(below: NumberedFile, layer: NumberedFile) -> str | None:
    missing = layer.number - below.number - 1
    if not missing:
        return None
    return (
        f"{layer.name}: {_layers_are(missing)} missing between it and {below.name}; put back what"
        f" is missing, or accept the chain without it with {ALLOW_GAPS}"
    )


def _doubt(lowest: int) -> str | None:
    if not lowest:
        return None
    return (
        f"{_layers_are(lowest)} missing below it, so it may be a diff; put back what is missing,"
        f" number it 0 if it is a base, or accept it as one with {ALLOW_GAPS}"
    )


def _layers_are(number: int) -> str:
    return "1 layer is" if number == 1 else f"{number} layers are"


def _looks_like_memory(
    file: NumberedFile, layer: NumberedFile, seen: Mapping[str, os.stat_result]
) -> bool:
    # A diff with another of the suffixes, passed through, would look like an image full of zeros.
    return file.suffix in SUFFIXES and seen[file.name].st_size == seen[layer.name].st_size


def _refuse_pairs(files: list[NumberedFile], what: str) -> None:
    # `what` is 'number' or 'stem'.
    known: dict[object, NumberedFile] = {}
    for file in files:
        other = known.setdefault(getattr(file, what), file)
        if other is not file:
            raise BrokenChainError(
                f"{other.name} and {file.name} are two memory files with the same {what};"
                " rename or remove one, or choose a suffix with --suffix"
            )


def _dotted(suffix: str) -> str:
    return suffix if suffix.startswith(".") else f".{suffix}"
