"""The page of a benchmark, made from its JSON file alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.figures import Limit, Spread, spread
from tests.bench.goal import Absent, Cases, Goal
from tests.bench.goals import GOALS
from tests.bench.measure import OTHERS
from tests.bench.profile import PERIOD, PROFILE

_INTRO = """\
This page is written by `make bench`, from [its raw results](benchmarks.json) alone. The
contestants of a case take turns in each round, in an order that chance decides; the first round is
thrown away. Before each cold run the layers are in the page cache, and of the view the kernel has
nothing. Shown is the median of the counted rounds, with the least and the greatest. A ratio is
taken round by round; where its spread holds 1.0 it is called equal. Every server's bytes were
compared with the layers' before it was timed. Where a run takes much new memory, that is touched
and freed right before it, or what else the machine has free is held, so that no run waits for a
host that must give memory first.

A floor tells what can be had of a goal's number where the program runs: it is that of another
program on the same kernel which does only what it must; measured in the same rounds and reckoned in
the same way. It changes no outcome."""

#: Per cent of the processors' time that others may take: kernel threads need some.
_QUIET = 20

#: What is measured in each case; a name may end in a part that varies.
_ABOUT = {
    "sequential": "The image read from start to end with read(2) of 1 MiB, each server's mount at"
    " its own best read_ahead_kb of those tried. `, warm`: once more, from the page cache."
    " `diffmergefs`: the dirty pages dealt among 3 diffs.",
    "random-one-cpu": "As `random`, but client and server are on one CPU: no other CPU is woken.",
    "random": "First touch of random pages through a mapping, by one thread, readahead off; client"
    " and server are pinned to a CPU each. A touch is a request of 4 KiB. `server's CPU time` is"
    " what the scheduler counts for the server's threads: the rest is the kernel's, the client's,"
    " and the way from one CPU to the other.",
    "threads": "First touch of random pages by 8 threads at once. Nothing is pinned.",
    "cached": "All of the image is in the page cache; no server is asked. Page fault: each page"
    " once, in a random order, through a mapping. `C floor`: a mount of the C server, with the"
    " view's readahead.",
    "drop-behind": "A cold read in order with and without `--drop-behind`, and how much of the"
    " layers is in the page cache afterwards.",
    "slow-store": "Random reads of 4 KiB from a view whose base lies on a store that takes 5 ms a"
    " read, by one client and by 8 at once.",
    "faults": "First touch of random pages of a guest's memory that `diffmergefs uffd` fills from a"
    " base and 3 diffs, a page each time (`--fault-around=4K`). Guest and server are on one CPU."
    " `C floor`: a server of C that copies each page from one mapping of the flattened image.",
    "rediff": "The difference of two complete images that are equal and in the page cache.",
    "flatten-": "A new standalone image of a base and 3 diffs, on the disk at the end (fsync). The"
    " filesystem lies on a file in memory. `diffmergefs.flatten`: from Python, so without the start"
    " of one, which the command adds. `the same sharing from C`, where files can share blocks: the"
    " base cloned whole, then each diff's extents cloned into it.",
    "mount-time": "From the call of `diffmergefs mount` to its return, which is when the mount"
    " answers.",
    "reads-go-on": "One client looks at all snapshots of a fresh mount, which has their layers"
    " walked, while another reads random pages of one of them.",
    "memory": "The memory of keeper and server (Rss, what they share once, and the memory files"
    " between them) before and after chains of four diffs are opened and read in 64 places.",
    "kills": "Clients read random pages, none of them in the page cache, while the server is killed"
    " with SIGKILL 20 times: a client's longest read over each kill, less the longest one without"
    " kills.",
    "index": "The merge of four layers' extents into one map of segments.",
    "restore-readahead": "First reply from a cold view, by the mount's read_ahead_kb. QEMU's"
    " MADV_HUGEPAGE is left out: it makes faults larger, whatever the readahead says.",
    "restore-": "A Linux guest under QEMU (TCG): from the start of QEMU to the guest's first answer"
    " on its console. The view is of a full image, data throughout, and two diffs. QEMU calls"
    " MADV_HUGEPAGE for its memory; where it says so, it was kept from that. `C floor, cold`: a"
    " mount of the C server on the flattened image, with the view's readahead. Those that flatten"
    " first have rounds of their own after the others', which would pay for what a copy leaves to"
    " do, and a cold view beside them.",
    "firecracker-many": "As `firecracker`, but so many VMs are restored at once, each by its own"
    " Firecracker: the mean of them. Pss: of the mapping of a guest's memory, when all have their"
    " sums. A VM that has its sum is paused.",
    "firecracker": "A guest of 256 MiB without an operating system under Firecracker: from the"
    " call of `/snapshot/load` to its first answer on its console, and to the sum over its working"
    " set, which follows; it reads that in a scattered order. Firecracker's process is there before"
    " the call. The view is of a full snapshot and three diffs that Firecracker made. `recorded`:"
    " the mount prefetches (`notify`) what one restore has touched. `uffd`: a page server, for a"
    " guest with pages of that size; `recorded`: it copies the same working set ahead. Those that"
    " flatten first have rounds of their own, and a cold view beside them.",
    "many": "VMs that stay alive, one after the other started from one memory file: the mean first"
    " reply of the second and later ones.",
}


def write(path: Path) -> Path:
    """Write the page of a JSON file beside it, and the plots below it; the page's path."""
    from tests.bench import plots

    document = load(path)
    page = path.with_suffix(".md")
    pictures = plots.draw(document["cases"], path.with_suffix(""))
    page.write_text(text(document, {c: p.name for c, p in pictures.items()}), encoding="utf-8")
    return page


def load(path: Path) -> dict[str, Any]:
    """The results in a JSON file."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def text(document: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The page; `pictures` has for each case with a plot its file's name in `benchmarks/`."""
    return "\n".join(_lines(document, pictures)) + "\n"


def _lines(document: Mapping[str, Any], pictures: Mapping[str, str]) -> Iterator[str]:
    cases: Cases = document["cases"]
    yield from ("# Benchmarks: what `make bench` measured", "", *_INTRO.splitlines(), "")
    yield from ("## Machine", "", "| what | which |", "|---|---|")
    yield from (f"| {name} | {value} |" for name, value in document["machine"].items())
    scales = {case["scale"] for case in cases.values()} - {"full"}
    if scales:
        yield ""
        yield f"Not a full run: some cases were run with smaller sizes ({', '.join(scales)})."
    if (
        others := max((case["facts"].get(OTHERS, 0) for case in cases.values()), default=0)
    ) > _QUIET:
        yield ""
        yield f"The machine was not quiet: other programs took up to {others} % of its processors."
    yield from ("", "## Goals", "", *_goals(cases))
    for name, case in cases.items():
        yield from ("", f"## {name}", "", *_case(name, case, pictures.get(name)))


def _goals(cases: Cases) -> Iterator[str]:
    yield "| case | goal | measured (least - greatest) | outcome |"
    yield "|---|---|---|---|"
    for goal in GOALS:
        cells = (goal.title, _limit(goal), _measured(goal, cases), outcome(goal, cases))
        yield f"| {' | '.join(cells)} |"


def outcome(goal: Goal, cases: Cases) -> str:
    """The goal's outcome, with what one must know of how it was measured."""
    known = [cases[name] for name in goal.cases if name in cases]
    notes = [f"{case['scale']} run" for case in known if case["scale"] != "full"]
    if any(case["facts"].get("maps read-only") is False for case in known):
        notes.append("`--open-rw`: this QEMU maps read-write only")
    said = goal.outcome(cases)
    if said.startswith("not measured"):
        return said
    noted = f" ({', '.join(dict.fromkeys(notes))})" if notes else ""
    return f"{said}{_floor(goal, cases, said)}{noted}"


def _floor(goal: Goal, cases: Cases, said: str) -> str:
    # What follows the outcome `said` where the goal's floor was measured.
    found = goal.floor_measured(cases)
    if goal.floor is None or found is None:
        return ""
    beyond = said == "not met" and goal.beyond_floor(cases)
    before = f": beyond what {goal.floor.within} allows here, " if beyond else "; "
    return f"{before}floor {_spread(found)}{_space(goal.unit)}: {goal.floor.what}"


def _limit(goal: Goal) -> str:
    if goal.limit is None:
        return "-"
    return f"{_sign(goal.limit)} {number(goal.limit.value)}{_space(goal.unit)}"


def _sign(limit: Limit) -> str:
    return "≥" if limit.least else "≤"


def _measured(goal: Goal, cases: Cases) -> str:
    try:
        found = goal.measured(cases)
    except Absent:
        return "-"
    equal = ", equal" if goal.is_ratio and found.equal else ""
    return f"{_spread(found)}{_space(goal.unit)}{equal}"


def _case(name: str, case: Mapping[str, Any], picture: str | None) -> Iterator[str]:
    about = _ABOUT.get(name) or next(
        (text for part, text in _ABOUT.items() if part.endswith("-") and name.startswith(part)), ""
    )
    yield from (about, "")
    rounds = {len(series["values"]) for series in case["series"].values()}
    counted = " or ".join(map(str, sorted(rounds))) or "no"
    yield f"{case['when']}, {case['scale']} run, {counted} counted rounds, {case['seconds']} s."
    if picture:
        yield from ("", f"![{name}](benchmarks/{picture})")
    if case["series"]:
        yield from ("", "| what | median | least | greatest | unit | against the first |")
        yield "|---|---|---|---|---|---|"
        yield from _series(case["series"])
    if PROFILE in case["facts"]:
        yield from ("", *_profile(name, case["facts"][PROFILE]))
    facts = {what: said for what, said in case["facts"].items() if said != {} and what != PROFILE}
    if facts:
        yield ""
        yield from (f"- {what}: {_said(said)}" for what, said in facts.items())
    if case["missing"]:
        yield from ("", "Not measured:", "")
        yield from (f"- {what or 'all of it'}: {why}" for what, why in case["missing"].items())


def _series(series: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    # Each beside the ratio of its median to that of the first series with the same unit.
    first: dict[str, float] = {}
    for name, found in series.items():
        shown = spread(found["values"])
        base = first.setdefault(found["unit"], shown.median)
        against = f"{shown.median / base:.2f}" if base else "-"
        cells = (number(shown.median), number(shown.least), number(shown.greatest))
        yield f"| {name} | {' | '.join(cells)} | {found['unit']} | {against} |"


#: Whose time a profile shows; a name may end in a part that varies.
_PROFILED = {
    "cached": "Where the time of a page goes that is read from the page cache with read(2) of"
    " 1 MiB: the client,",
    "flatten-": "Where the time goes of an extent that is shared with FICLONERANGE: the program,",
    "": "Where the time of a request goes: the CPU that client and server share,",
}
_SAMPLED = (
    " sampled by perf every {us} us (cpu-clock) in further runs, which sampling slows down and"
    " which count nowhere else. Kernel code that lets no interrupt in is charged to the place that"
    " allows them again. In us, and in per cent of the time by the clock; `rest`: other programs,"
    " waiting, and what sampling missed."
)


def _profile(case: str, profile: Mapping[str, Any]) -> Iterator[str]:
    # The modules of all that were profiled side by side, then each one's symbols.
    whose = next(text for part, text in _PROFILED.items() if case.startswith(part))
    yield whose + _SAMPLED.format(us=PERIOD // 1000)
    yield from ("", f"| in | {' | '.join(profile)} |", "|---|" + "---|" * len(profile))
    columns = [_modules(found) for found in profile.values()]
    greatest = {place: max(c.get(place, 0) for c in columns) for c in columns for place in c}
    last = ["rest", "all"]
    for place in (*sorted(greatest.keys() - last, key=lambda p: (-greatest[p], p)), *last):
        shares = (_share(column.get(place), column["all"]) for column in columns)
        yield f"| {place} | {' | '.join(shares)} |"
    yield from ("", "| of | symbol | in | us | % |", "|---|---|---|---|---|")
    for name, found in profile.items():
        for top in found["symbols"]:
            cells = (name, f"`{top['symbol']}`", top["in"], number(top["us"]))
            yield f"| {' | '.join(cells)} | {_per_cent(top['us'], found['us'])} |"


def _modules(found: Mapping[str, Any]) -> dict[str, float]:
    seen = sum(found["modules"].values())
    return {**found["modules"], "rest": max(0.0, found["us"] - seen), "all": found["us"]}


def _share(us: float | None, whole: float) -> str:
    return "-" if us is None else f"{number(us)} us, {_per_cent(us, whole)} %"


def _per_cent(us: float, whole: float) -> str:
    return f"{us / whole * 100:.0f}"


def _spread(found: Spread) -> str:
    return f"{number(found.median)} ({number(found.least)} - {number(found.greatest)})"


def number(value: float) -> str:
    """Three digits that count, without an exponent."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = f"{value:.3g}"
    return digits if "e" not in digits else f"{value:.6f}".rstrip("0").rstrip(".")


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_said(said)}" for name, said in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_said, value))
    return number(value) if isinstance(value, int | float) and value is not True else str(value)


def _space(unit: str) -> str:
    return f" {unit}" if unit else ""
