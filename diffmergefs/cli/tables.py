"""Tables on stdout.

What draws them is loaded with the first one: it takes some 40 ms.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

# Wide enough that a line stays a line where nobody looks at it on a terminal.
_PIPE_WIDTH = 4096


def print_table(table: Table) -> None:
    """A table on stdout: one line a row when it goes into a pipe."""
    from rich.console import Console

    console = Console(
        highlight=False,
        markup=False,
        emoji=False,
        width=None if sys.stdout.isatty() else _PIPE_WIDTH,
    )
    # Printed by print(): rich ends the process with status 1 when the reader has gone away.
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def new_table(*columns: str) -> Table:
    """An empty table; columns that begin with `>` are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold")
    return table
