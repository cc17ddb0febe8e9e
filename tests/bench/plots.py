"""Pictures of a benchmark's cases: a bar for each series, with its least and its greatest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot

from tests.bench.figures import Spread, spread

_OURS, _OTHERS = "#2a6f97", "#9aa5b1"
_WIDTH, _BAR = 7.0, 0.3
#: What is drawn: of each such case the series with the unit of its first one.
_DRAWN = (
    "sequential",
    "random",
    "random-one-cpu",
    "threads",
    "flatten-",
    "restore-",
    "mount-time",
    "firecracker",
)


def draw(cases: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Path]:
    """Write an SVG file into `folder` for each case that is drawn, and give their paths by case.

    The same figures give the same bytes with one version of matplotlib.
    """
    found = {}
    for name, case in cases.items():
        if case["series"] and name.startswith(_DRAWN):
            folder.mkdir(exist_ok=True)
            found[name] = folder / f"{name}.svg"
            _draw(name, case["series"], found[name])
    for path in folder.glob("*.svg") if folder.is_dir() else ():
        if path not in found.values():
            path.unlink()
    return found


def _draw(title: str, series: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    unit = next(iter(series.values()))["unit"]
    shown = {
        name: spread(found["values"])
        for name, found in series.items()
        if found["unit"] == unit and "server's CPU time" not in name
    }
    names = list(shown)[::-1]
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(_WIDTH, 1 + _BAR * len(names)))
        axes.barh(
            names,
            [shown[name].median for name in names],
            xerr=_errors([shown[name] for name in names]),
            color=[
                _OURS if name.startswith(("diffmergefs", "view")) else _OTHERS for name in names
            ],
            ecolor="black",
            capsize=2,
        )
        axes.set_xlim(left=0)
        axes.set_xlabel(unit)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _errors(shown: list[Spread]) -> list[list[float]]:
    below = [found.median - found.least for found in shown]
    above = [found.greatest - found.median for found in shown]
    return [below, above]
