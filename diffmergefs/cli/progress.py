"""Progress, shown on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(
    what: str, total: int | None = None, *, unit: str = "bytes"
) -> Iterator[Callable[[int], None]]:
    """A callable that takes how much is done so far; on a terminal it moves a progress bar.

    `total` is None where it is not known. Counts are shown as sizes if `unit` is 'bytes', and not
    at all without a unit. Nothing is shown where stderr is no terminal.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    # Loaded only where somebody looks: it takes some 40 ms.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts: tuple[ProgressColumn, ...] = (DownloadColumn(binary_units=True), TransferSpeedColumn())
    if unit != "bytes":
        counts = (MofNCompleteColumn(), TextColumn(unit)) if unit else ()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *counts,
        TimeElapsedColumn() if total is None else TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        # What is printed meanwhile would go where the bar goes, to stderr.
        redirect_stdout=False,
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
