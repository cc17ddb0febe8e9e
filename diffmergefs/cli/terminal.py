"""A map of an image for the terminal: a row of block characters for each layer."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.text import Text

from diffmergefs.analysis.info import MapEntry
from diffmergefs.cli.output import print_table
from diffmergefs.core.errors import counted
from diffmergefs.pictures import maps
from diffmergefs.pictures.maps import (
    HOLE,
    Kinds,
    Subject,
    address,
    percent,
    shortened,
    size_text,
)

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#@"
_STEPS = len(_BLOCKS) - 1
_LEAST = 16
_DIFF_STYLES = ("cyan", "green", "yellow", "magenta")


class TerminalMap:
    """The map of a range, as wide as the terminal."""

    def __init__(self, entries: Iterable[MapEntry], subject: Subject) -> None:
        """Read the entries, once and in order. Nothing is printed."""
        # The locale decides on the characters. rich decides on colours (NO_COLOR, pipes).
        self._ramp = _BLOCKS if _supports_utf8() else _ASCII
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._subject = subject
        self._kinds = kinds = Kinds(len(subject.names))
        self._labels = _labels(kinds, subject, self._console.width // 4)
        self._indent = max(map(len, self._labels.values())) + 1
        columns = max(self._console.width - self._indent, _LEAST)
        self._grid = maps.row_grid(subject.start, subject.stop, subject.page, columns)
        found = ((e.start, e.stop, kinds.of(e.layer, e.zero)) for e in entries)
        self._rows = maps.bytes_by_kind(found, self._grid, len(kinds))
        self._totals = [sum(row) for row in self._rows]

    def print(self, paths: list[str]) -> None:
        """Print the rows on stdout, and below them the total of each.

        `paths` are the layers' files, already printable.
        """
        # print() writes it: rich ends the process with status 1 when the reader has gone away.
        with self._console.capture() as capture:
            for line in _title(self._subject, self._grid):
                self._console.print(line, soft_wrap=True)
            self._console.print()
            self._print_rows()
            self._console.print()
        print("\n".join(line.rstrip() for line in capture.get().splitlines()))
        _print_legend(self._kinds, self._subject, paths, self._totals)
        if self._subject.scanned and not any(self._totals[kind - 1] for kind in self._kinds.layers):
            print("There are no written zeros.")
        print(f"\n{_scale(self._subject, self._grid, self._ramp)}")
        if self._kinds.grouped:
            print(f"{self._kinds.note()} --json names the layer of each range.")

    def _print_rows(self) -> None:
        mark = "│" if self._ramp == _BLOCKS else "|"
        for line in _ruler(self._subject, self._grid, mark):
            self._console.print(" " * self._indent + line, style="dim", soft_wrap=True)
        for kind in self._kinds.present(self._totals):
            label = self._labels[kind]
            bar = "".join(_bar(self._rows[kind], self._grid, self._subject.page, self._ramp))
            text = Text(f"{label:<{self._indent}}").append(bar, _style(kind))
            self._console.print(text, soft_wrap=True)


def _supports_utf8() -> bool:
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    if encoding != "utf8":
        return False
    # In the C locale Python uses UTF-8, and for LANG=C it sets LC_CTYPE accordingly (PEP 538). The
    # terminal may not support UTF-8.
    locale = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG")
    if locale == "C.UTF-8" and not os.environ.get("LC_ALL"):
        locale = os.environ.get("LANG") or locale
    return locale not in ("C", "POSIX")


def _labels(kinds: Kinds, subject: Subject, width: int) -> dict[int, str]:
    # The labels of all rows that there may be.
    rows = range(len(kinds)) if subject.scanned else [HOLE, *kinds.layers]
    numbers = {kind: kinds.label(kind) for kind in rows}
    indent = max(map(len, numbers.values()))
    room = max(width - indent - 1, 5)
    names = {kind: shortened(_row_name(kinds, kind, subject), room) for kind in rows}
    return {kind: f"{numbers[kind]:>{indent}} {names[kind]}" for kind in rows}


def _row_name(kinds: Kinds, kind: int, subject: Subject) -> str:
    layers = kinds.group(kind)
    is_group = len(layers) > 1 and not kinds.is_zeros(kind)
    return counted(len(layers), "layer") if is_group else kinds.name(kind, subject.names)


def _title(subject: Subject, grid: maps.Grid) -> Iterator[str]:
    yield f"{subject.title}: {size_text(subject.size)}, {counted(len(subject.names), 'layer')}"
    pages = counted(grid.cell // subject.page, "page")
    first, last = (address(at, subject.stop) for at in (subject.start, subject.stop))
    yield f"{first} to {last}, {pages} a column ({size_text(grid.cell)})"


def _ruler(subject: Subject, grid: maps.Grid, mark: str) -> tuple[str, str]:
    # Addresses that are multiples of a power of two, as many as fit, and always that of the start.
    width = len(address(0, subject.stop)) + 2
    step = 1 << (width * grid.cell - 1).bit_length()
    marks = {0: grid.origin}
    for offset in range(grid.origin - grid.origin % step + step, subject.stop, step):
        column = (offset - grid.origin) // grid.cell
        if column >= width:
            marks[column] = offset
    # The last one could extend beyond the end of the row.
    marks = {c: offset for c, offset in marks.items() if not c or c + width - 2 <= grid.cells}
    addresses = ticks = ""
    for column, offset in marks.items():
        addresses = addresses.ljust(column) + address(offset, subject.stop)
        ticks = ticks.ljust(column) + mark
    return addresses, ticks


def _bar(row: array[int], grid: maps.Grid, page: int, ramp: str) -> Iterator[str]:
    for number, nbytes in enumerate(row):
        yield ramp[maps.level(nbytes, grid.bytes_in(number), page, _STEPS)]


def _style(kind: int) -> str:
    if kind == HOLE:
        return "dim"
    # Written zeros look like their layer.
    layer = (kind - 1) // 2
    return _DIFF_STYLES[layer % len(_DIFF_STYLES)] if layer else ""


def _print_legend(kinds: Kinds, subject: Subject, paths: list[str], totals: list[int]) -> None:
    whole = subject.stop - subject.start
    print_table(
        (">#", "LAYER", "=BYTES", ">SHARE"),
        (
            (kinds.label(kind), kinds.name(kind, paths), totals[kind], percent(totals[kind], whole))
            for kind in kinds.present(totals)
        ),
    )


def _scale(subject: Subject, grid: maps.Grid, ramp: str) -> str:
    if grid.cell == subject.page:
        return f"{ramp[1]} a part of a page, {ramp[-1]} all of it"
    return (
        f"{ramp[1]} a page or less, {ramp[-1]} all of a column,"
        f" {ramp[2:-1]} between them on a logarithmic scale"
    )
