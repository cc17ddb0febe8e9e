"""The kinds of content of a map (holes, written zeros, layers or groups), and their names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

HOLE = 0
ZEROS = 1
BASE = 2

MAX_GROUPS = 12

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Subject:
    """The subject of a map: `[start, stop)` of an image of `size` bytes, in pages of `page` bytes.

    `names` are those of its layers, base first, and `title` is that of the image; both are printed
    as they are. `scanned` means that the data were scanned for written zeros.
    """

    title: str
    names: Sequence[str]
    size: int
    start: int
    stop: int
    page: int
    scanned: bool


class Kinds:
    """The kinds of content of a map of `layers` layers, as numbers for `cells`.

    0 is a hole in all layers, 1 is written zeros, and from 2 on come the layers, the base first.
    More than 12 layers are grouped: the base stays alone, and the diffs form 11 groups of
    neighbours of equal size, or one more in the older ones.
    """

    def __init__(self, layers: int) -> None:
        self.groups = _groups(layers)
        self._of_layer = [kind for kind, group in enumerate(self.groups, BASE) for _ in group]
        self.layers = range(BASE, BASE + len(self.groups))

    def __len__(self) -> int:
        return BASE + len(self.groups)

    @property
    def grouped(self) -> bool:
        """Whether any kind represents more than one layer."""
        return len(self.groups) < len(self._of_layer)

    def of(self, layer: int | None, zero: bool) -> int:
        """The kind of bytes that `layer` supplies (None: a hole); `zero`: all are zeros."""
        if layer is None:
            return HOLE
        return ZEROS if zero else self._of_layer[layer]

    def group(self, kind: int) -> range:
        """The layers that a kind represents."""
        return self.groups[kind - BASE] if kind >= BASE else range(0)

    def label(self, kind: int) -> str:
        """The numbers of a kind's layers, '3' or '4-7'; '-' for holes and zeros."""
        if not (group := self.group(kind)):
            return "-"
        return str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"

    def name(self, kind: int, names: Sequence[str]) -> str:
        """The name of a kind; `names` are those of the layers."""
        if not (group := self.group(kind)):
            return ("zero by hole", "written zeros")[kind]
        if len(group) == 1:
            return names[group[0]]
        return f"{names[group[0]]} .. {names[group[-1]]}"

    def note(self) -> str:
        """A note that layers are grouped; empty if they are not."""
        if not self.grouped:
            return ""
        return (
            f"{len(self._of_layer)} layers are drawn as {len(self.groups)}: the base, and the diffs"
            " in groups of neighbours."
        )


def _groups(layers: int) -> list[range]:
    if layers <= MAX_GROUPS:
        return [range(n, n + 1) for n in range(layers)]
    size, larger = divmod(layers - 1, MAX_GROUPS - 1)
    groups = [range(1)]
    for number in range(MAX_GROUPS - 1):
        start = groups[-1].stop
        groups.append(range(start, start + size + (number < larger)))
    return groups


def short_names(paths: Sequence[str]) -> list[str]:
    """The distinguishing parts of paths: without the directories, file name or suffix of all.

    `/s/base/memory.bin` and `/s/work/memory.bin` are 'base' and 'work', `/s/0-base.mem` and
    `/s/1-work.mem` are '0-base' and '1-work'. One path alone becomes its file name.
    """
    split = [path.split("/") for path in paths]
    if len(set(paths)) == 1:
        return [parts[-1] for parts in split]
    if len({parts[-1] for parts in split}) == 1 and all(any(parts[:-1]) for parts in split):
        split = [parts[:-1] for parts in split]
    common = 0
    while all(len(parts) > common + 1 for parts in split) and (
        len({parts[common] for parts in split}) == 1
    ):
        common += 1
    names = ["/".join(parts[common:]) for parts in split]
    suffixes = {os.path.splitext(name)[1] for name in names}
    return [os.path.splitext(name)[0] for name in names] if len(suffixes) == 1 else names


def shortened(name: str, length: int) -> str:
    """The name, with '..' in its middle if it has more than `length` characters (at least 5)."""
    if len(name) <= length:
        return name
    head = (length - 2) // 2
    return f"{name[:head]}..{name[head + 2 - length :]}"


def percent(part: int, whole: int) -> str:
    """`part` of `whole` in percent; 0.00 only for nothing, and 100.00 only for everything."""
    text = f"{100 * part / whole:.2f}"
    if part and text == "0.00":
        return "<0.01 %"
    return ">99.99 %" if part < whole and text == "100.00" else f"{text} %"


def size_text(nbytes: int) -> str:
    """A number of bytes in the largest binary unit that is not above it; at most two decimals."""
    power = min(max(nbytes.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    number = f"{nbytes / 1024**power:.2f}".rstrip("0").rstrip(".")
    return f"{number} {_UNITS[power]}"


def address(offset: int, stop: int) -> str:
    """The offset in hexadecimal, as wide as all of a range that ends at `stop` need."""
    return f"{offset:#0{2 + max(8, len(f'{stop:x}'))}x}"
