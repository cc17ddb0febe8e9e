"""What commands print: results on stdout; diagnostics and progress on stderr.

`rich` is imported with the first table or progress bar: the import takes about 40 ms.
"""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal

from diffmergefs.core.workers import Progress, ignore_progress
from diffmergefs.pictures.maps import size_text

if TYPE_CHECKING:
    from rich.progress import ProgressColumn
    from rich.table import Table

# Unicode's categories of control characters, line and paragraph separators.
_ESCAPED = frozenset({"Cc", "Zl", "Zp"})

# Wide enough that each row stays one line, which can be copied from a narrow terminal too.
_WIDTH = 1 << 16

# The time between two updates of a bar: an update costs more than copying a page.
_SECONDS = 0.1


def printable(text: str) -> str:
    """The text with escapes for everything that is unsafe on a terminal or in a log.

    Escaped are bytes that are not valid UTF-8, control characters, and Unicode line separators.
    """
    try:
        line = os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        line = ascii(text)[1:-1]
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in _ESCAPED else c for c in line)


def diagnostic(text: str) -> str:
    """The text as a line of diagnostics: on one line, with the program's name in front."""
    return f"diffmergefs: {' '.join(printable(text).split())}"


def print_diagnostic(*texts: str) -> None:
    """Print a line for each text on stderr. If that cannot be written, the command goes on."""
    for text in texts:
        with suppress(OSError):
            print(diagnostic(text), file=sys.stderr, flush=True)


def print_json(facts: object) -> None:
    """Print the facts as JSON on stdout."""
    print(json.dumps(facts, indent=2))


def sized(number: int, word: str = "") -> str:
    """A number of bytes, and beside it the number of KiB, MiB or larger: `4096 bytes (4 KiB)`.

    `word` is 'bytes', or empty for a column of a table.
    """
    noun = f" {word if number != 1 else word.removesuffix('s')}" if word else ""
    return f"{number}{noun}" + (f" ({size_text(number)})" if number >= 1024 else "")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table. A column whose name begins with `>` holds numbers, aligned to the right.

    One whose name begins with `=` holds numbers of bytes. Cells are printed as their `str`, escaped
    by `printable`, and None as `-`.
    """
    from rich.table import Table

    def text(column: str, cell: object) -> str:
        if cell is None:
            return "-"
        return sized(cell) if column[0] == "=" and isinstance(cell, int) else printable(str(cell))

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column[0] in ">=" else "left"
        made.add_column(column.lstrip(">="), justify=justify, no_wrap=True)
    for row in rows:
        made.add_row(*map(text, columns, row))
    return made


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a `table` on stdout. Each row is one line, however narrow the terminal is."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False, width=_WIDTH)
    # print() writes it: rich ends the process with status 1 when the reader has gone away.
    with console.capture() as capture:
        console.print(table(columns, rows))
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


@contextmanager
def progress(what: str, total: int | None = None, *, unit: str = "bytes") -> Iterator[Progress]:
    """A callable that takes the amount done since its last call, and moves a progress bar.

    `total` is None if it is unknown. Counts are formatted as sizes if `unit` is 'bytes', and left
    out if it is empty. Nothing is printed if stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield ignore_progress
        return
    from rich import progress as bars
    from rich.console import Console

    counts: tuple[ProgressColumn, ...] = ()
    if unit == "bytes":
        counts = (bars.DownloadColumn(binary_units=True), bars.TransferSpeedColumn())
    elif unit:
        counts = (bars.MofNCompleteColumn(), bars.TextColumn(unit))
    bar = bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        *counts,
        bars.TimeElapsedColumn() if total is None else bars.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        # rich would move whatever is printed meanwhile to the bar's stream, stderr.
        redirect_stdout=False,
    )
    with bar:
        task = bar.add_task(what, total=total)
        pending, due = 0, 0.0

        def advance(count: int) -> None:
            nonlocal pending, due
            pending += count
            if (now := time.monotonic()) >= due:
                bar.advance(task, pending)
                pending, due = 0, now + _SECONDS

        yield advance
        bar.advance(task, pending)
