"""The benchmark's own parts: its rules, its rounds, its page; and a run of the smallest scale.

Nothing here is timed.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pyfuse3
import pytest

from tests.bench import __main__ as bench
from tests.bench import (
    goals,
    images,
    measure,
    microvms,
    profile,
    programs,
    read_cases,
    report,
)
from tests.bench.cases import topics
from tests.bench.figures import Limit, difference, ratio, spread, verdict
from tests.bench.goal import Absent, Floor, Goal, Series
from tests.bench.goals import GOALS
from tests.bench.measure import (
    MIB,
    SCHEMA,
    TINY,
    Contestant,
    NotMeasured,
    Record,
    Results,
    alternate,
    little_free,
    touch_free,
)
from tests.bench.servers import Server
from tests.support import loopfs, skips
from tests.support.places import DOCS
from tests.vm import firecracker

PAGE = DOCS / "benchmarks.md"


def test_free_memory_is_held_but_for_so_much() -> None:
    # All but 64 MiB more than the machine has is nothing; all but less than it has is the rest.
    free = os.sysconf("SC_AVPHYS_PAGES") * measure.PAGE
    before = resident()
    with little_free(2 * free):
        assert resident() - before < 8 * MIB
    with little_free(free - 64 * MIB):
        assert 32 * MIB < resident() - before < 192 * MIB  # others take and free some meanwhile
    assert resident() - before < 8 * MIB


def test_memory_is_touched_and_freed() -> None:
    size = 8 * MIB + 100
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch_free(size)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before > size // 4096 // 512


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * measure.PAGE


# (a) Numbers


def test_a_spread_is_the_median_with_the_least_and_the_greatest() -> None:
    found = spread([5.0, 1.0, 2.0, 9.0])
    assert (found.median, found.least, found.greatest, found.count) == (3.5, 1.0, 9.0, 4)


def test_a_ratio_is_taken_round_by_round() -> None:
    # The machine was slow in the second round, for both.
    found = ratio([2.0, 20.0, 3.0], [1.0, 10.0, 2.0, 99.0])
    assert (found.median, found.least, found.greatest, found.count) == (2.0, 1.5, 2.0, 3)
    assert difference([5.0, 7.0], [1.0, 2.0]).median == 4.5


@pytest.mark.parametrize(
    ("ratios", "equal"),
    [
        ([0.9, 1.1], True),
        ([1.0, 1.2], True),
        ([0.8, 1.0], True),
        ([1.01, 1.2], False),
        ([0.8, 0.99], False),
    ],
)
def test_a_ratio_is_called_equal_where_its_spread_holds_one(
    ratios: list[float], equal: bool
) -> None:
    assert spread(ratios).equal is equal


@pytest.mark.parametrize(
    ("limit", "values", "is_ratio", "outcome"),
    [
        (Limit(1.05), [1.04, 1.06, 1.05], True, "met"),
        (Limit(1.05), [1.06, 1.07], True, "not met"),
        (Limit(1.05), [0.9, 1.06, 1.2], True, "not met"),
        (Limit(1.8, least=True), [1.8, 1.9], True, "met"),
        (Limit(1.8, least=True), [1.7, 1.75], True, "not met"),
        (Limit(1.0, least=True), [0.97, 0.99, 1.01], True, "equal"),
        (Limit(1.0, least=True), [0.97, 0.98, 0.99], True, "not met"),
        (Limit(1.0, least=True), [0.97, 1.02, 1.05], True, "met"),
        (Limit(1.0), [0.9, 1.2, 1.3], False, "not met"),
        (Limit(0), [0.0, 0.0], False, "met"),
    ],
)
def test_the_verdict_on_a_goal(
    limit: Limit, values: list[float], is_ratio: bool, outcome: str
) -> None:
    assert verdict(limit, spread(values), is_ratio=is_ratio) == outcome


# (b) Rounds and records


def test_contestants_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    prepared: list[int] = []

    def runner(name: str) -> Contestant:
        def run() -> measure.Figures:
            calls.append(name)
            return {name: ("calls", float(len(calls)))}

        return Contestant(name, run)

    record = Record("case", "tiny")
    alternate(record, [runner("a"), runner("b")], 8, lambda: prepared.append(len(calls)))
    rounds = [calls[n : n + 2] for n in range(0, len(calls), 2)]
    assert [sorted(names) for names in rounds] == [["a", "b"]] * 9
    assert ["a", "b"] in rounds and ["b", "a"] in rounds
    assert prepared == list(range(18))
    assert list(record.series) == ["a", "b"]
    for name in "ab":
        places = [n for n, called in enumerate(calls, 1) if called == name]
        assert record.series[name] == {"unit": "calls", "values": places[1:]}


def test_one_that_fails_loses_nobody_elses_numbers() -> None:
    rounds = iter(range(9))

    def fails() -> measure.Figures:
        if next(rounds) == 2:
            raise NotMeasured("it went away")
        return {"bad": ("s", 1.0)}

    record = Record("case", "tiny")
    alternate(record, [Contestant("bad", fails), Contestant("good", _one)], 3)
    assert record.series == {"good": {"unit": "s", "values": [1.0, 1.0, 1.0]}}
    assert record.missing == {"bad": "it went away"}


def _one() -> measure.Figures:
    return {"good": ("s", 1.0)}


def test_a_case_that_fails_is_recorded_with_its_reason() -> None:
    def fail(record: Record) -> None:
        record.add("before", "s", 1.0)
        raise OSError("no such thing")

    record = measure.run_case("case", TINY, fail)
    assert record.missing == {"": "OSError: no such thing"}
    assert record.series["before"]["values"] == [1.0]


def test_a_case_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CASE_SECONDS", 1)

    def forever() -> measure.Figures:
        while True:
            pass

    def body(record: Record) -> None:
        alternate(record, [Contestant("good", _one), Contestant("slow", forever)], 3)

    assert measure.run_case("case", TINY, body).missing == {"": "the case took longer than 1 s"}


def test_results_of_other_runs_stay(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for name, value in (("one", 1.0), ("two", 2.0), ("one", 3.0)):
        record = Record(name, "tiny")
        record.add("series", "s", value)
        Results(path).put(record, {"Linux": "6"})
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["schema"] == SCHEMA and document["machine"] == {"Linux": "6"}
    assert {
        name: case["series"]["series"]["values"] for name, case in document["cases"].items()
    } == {
        "one": [3.0],
        "two": [2.0],
    }


# (c) The page


def _case(scale: str = "full", missing: dict[str, str] | None = None, **series: Any) -> Any:
    record = Record("", scale, when="2026-01-01T00:00:00+00:00", missing=missing or {})
    for name, (unit, values) in series.items():
        for value in values:
            record.add(name.replace("_", " "), unit, value)
    return record.__dict__


FIXED: dict[str, Any] = {
    "schema": SCHEMA,
    "machine": {"Linux": "6.1"},
    "cases": {
        "sequential": _case(
            diffmergefs=("MiB/s", [900.0, 1000.0, 1100.0]),
            qemu_export=("MiB/s", [500.0, 500.0, 500.0]),
            missing={"C floor": "gcc is not installed"},
        ),
        "threads": _case(diffmergefs=("us", [9.0, 30.0]), qemu_export=("us", [10.0, 10.0])),
        "memory": _case(scale="quick", all_open=("MiB", [90.0])),
    },
}


def test_the_page_says_what_was_reached_and_what_was_not() -> None:
    lines = report.text(FIXED, {}).splitlines()
    rows = _goal_rows(FIXED)
    row = rows["read in order, cold, each at its best readahead: speed / QEMU's export"]
    assert row == ["≥ 1.8", "2 (1.8 - 2.2)", "met"]
    row = rows["the same: speed / the C floor's"]
    assert row == ["≥ 0.65", "-", "not measured: gcc is not installed"]
    row = rows["first touch by 8 threads: time / QEMU's export"]
    assert row == ["≤ 1.1", "1.95 (0.9 - 3), equal", "not met"]
    row = rows["daemon memory, 16 chains of 100,000 segments open"]
    assert row == ["≤ 80 MiB", "90 (90 - 90) MiB", "not met (quick run)"]
    row = rows["index of 4 x 1 M extents"]
    assert row[2] == "not measured: the case index was not run"
    assert "| diffmergefs | 1,000 | 900 | 1,100 | MiB/s | 1.00 |" in lines
    assert "| qemu export | 500 | 500 | 500 | MiB/s | 0.50 |" in lines
    assert "- C floor: gcc is not installed" in lines
    assert not [line for line in lines if line.startswith("The machine was not quiet")]
    assert "Not a full run: some cases were run with smaller sizes (quick)." in lines


def _goal_rows(document: dict[str, Any]) -> dict[str, list[str]]:
    # The table of the goals: the title -> the other cells.
    lines = report.text(document, {}).splitlines()
    table = [line for line in lines if line.startswith("| ") and line.count("|") == 5]
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in table]
    return {title: rest for title, *rest in rows}


@pytest.mark.parametrize(
    ("ours", "c", "said"),
    [
        ([70.0, 72.0], [95.0, 97.0], "not met; floor 0.96 (0.95 - 0.97): WHAT"),
        (
            [70.0, 72.0],
            [81.0, 83.0],
            "not met: beyond what the kernel's FUSE allows here, floor 0.82 (0.81 - 0.83): WHAT",
        ),
        # A floor that is worse than what was reached takes nothing away from it.
        ([95.0, 97.0], [81.0, 83.0], "met; floor 0.82 (0.81 - 0.83): WHAT"),
        ([95.0, 97.0], [], "met"),
    ],
)
def test_a_floor_is_told_beside_the_outcome(ours: list[float], c: list[float], said: str) -> None:
    document = copy.deepcopy(FIXED)
    speeds = {"diffmergefs": ours, "C floor": c, "flattened": [100.0, 100.0]}
    series: dict[str, Any] = {f"{name}: read": ("MiB/s", values) for name, values in speeds.items()}
    document["cases"]["cached"] = _case(**series)
    *_, outcome = _goal_rows(document)["view warm / flattened warm: read()"]
    assert outcome == said.replace("WHAT", "a C server's file, warm")


def test_the_floor_of_a_speed_takes_our_programs_place() -> None:
    document = copy.deepcopy(FIXED)
    series: dict[str, Any] = {
        "diffmergefs.flatten": ("s", [2.0, 2.0]),
        goals.WAYS[0]: ("s", [2.8, 2.8]),
        goals.WAYS[1]: ("s", [1.8, 2.0]),
        goals.SHARED: ("s", [1.0, 1.9]),
    }
    document["cases"]["flatten-xfs"] = _case(
        scale="quick",
        **series,
    )
    rows = _goal_rows(document)
    assert rows["flatten on xfs, reflink: speed / cp and overwrite"] == [
        "≥ 3",
        "1.4 (1.4 - 1.4)",
        "not met: beyond what the kernel's reflink allows here, floor 2.14 (1.47 - 2.8): "
        "the same sharing from C (quick run)",
    ]
    # Equal to the best of the peers, which the floor is a little better than.
    assert rows["flatten on xfs: speed / the best peer's"] == [
        "≥ 1",
        "0.95 (0.9 - 1), equal",
        "equal; floor 1.43 (1.05 - 1.8): the same sharing from C (quick run)",
    ]


@pytest.mark.parametrize(
    ("floor", "beyond"), [([0.97, 0.98, 1.01], False), ([0.97, 0.98, 0.99], True)]
)
def test_a_floor_that_is_equal_to_the_limit_reaches_it(floor: list[float], beyond: bool) -> None:
    ours, peer = Series("case", ("ours",)), Series("case", ("peer",))
    cases = {
        "case": _case(ours=("MiB/s", [0.5] * 3), peer=("MiB/s", [1.0] * 3), floor=("MiB/s", floor))
    }
    found = Floor("", "", Series("case", ("floor",)), peer)
    goal = Goal("", Limit(1.0, least=True), ours, peer, floor=found)
    assert goal.outcome(cases) == "not met"
    assert goal.beyond_floor(cases) is beyond


def test_a_floor_ran_in_the_rounds_of_its_goal() -> None:
    for goal in GOALS:
        if goal.floor:
            assert {goal.floor.over.case, goal.floor.under.case} == goal.cases


def test_the_page_tells_of_a_machine_that_was_not_quiet() -> None:
    document = copy.deepcopy(FIXED)
    document["cases"]["threads"]["facts"][measure.OTHERS] = 55
    line = "The machine was not quiet: other programs took up to 55 % of its processors."
    assert line in report.text(document, {}).splitlines()


def test_the_time_of_other_programs_is_noted() -> None:
    def work(record: Record) -> None:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass

    assert 0 <= measure.run_case("case", TINY, work).facts[measure.OTHERS] <= 100


def test_a_restore_that_was_mapped_read_write_is_told_of() -> None:
    document = copy.deepcopy(FIXED)
    series: dict[str, Any] = {"daemon: read requests for the later VMs": ("", [0.0])}
    document["cases"]["many"] = _case(**series)
    document["cases"]["many"]["facts"]["maps read-only"] = False
    (line,) = [
        ln for ln in report.text(document, {}).splitlines() if "requests at the daemon" in ln
    ]
    assert line.endswith("| met (`--open-rw`: this QEMU maps read-write only) |")


def test_the_page_and_its_plots_come_from_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps(FIXED), encoding="utf-8")
    stale = tmp_path / "benchmarks" / "restore-512.svg"
    stale.parent.mkdir()
    stale.touch()
    assert report.write(path) == tmp_path / "benchmarks.md"
    first = {file.name: file.read_bytes() for file in stale.parent.iterdir()}
    assert first.keys() == {"sequential.svg", "threads.svg"}
    assert b"qemu export" in first["sequential.svg"]
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "![sequential](benchmarks/sequential.svg)" in page
    report.write(path)
    assert {file.name: file.read_bytes() for file in stale.parent.iterdir()} == first


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (0.0123456, "0.0123"), (12.0, "12"), (0.000012, "0.000012"), (0.0, "0")],
)
def test_a_number_on_the_page(value: float, text: str) -> None:
    assert report.number(value) == text


def test_the_page_of_the_docs_holds_what_was_measured_and_nothing_else() -> None:
    document = report.load(PAGE.with_suffix(".json"))
    assert document["schema"] == SCHEMA
    pictures = {path.stem: path.name for path in (DOCS / "benchmarks").glob("*.svg")}
    assert PAGE.read_text(encoding="utf-8") == report.text(document, pictures)


def test_each_goal_names_a_case_that_a_full_run_has() -> None:
    known = {name for topic in topics(measure.FULL) for name in topic}
    assert {name for goal in GOALS for name in goal.cases} <= known
    assert len({goal.title for goal in GOALS}) == len(GOALS)


def test_what_is_missing_is_told_with_the_reason_of_its_contestant() -> None:
    cases = {
        "cached": _case(
            missing={"": "all", "diffmergefs": "ours", "diffmergefs, depth 1": "that of depth 1"}
        )
    }
    names = {
        "diffmergefs: read": "ours",
        "diffmergefs, depth 1: read": "that of depth 1",
        "flattened: read": "all",
    }
    for name, reason in names.items():
        goal = Goal("", Limit(1), Series("cached", (name,)))
        assert goal.outcome(cases) == f"not measured: {reason}"


def test_a_ratio_to_nothing_is_not_measured() -> None:
    cases = {"many": _case(a=("s", [1.0]), b=("s", [0.0]))}
    goal = Goal("", None, Series("many", ("a",)), Series("many", ("b",)))
    with pytest.raises(Absent, match="has a zero"):
        goal.measured(cases)


# (d) Images


def test_every_depth_has_the_same_segments_and_bytes(tmp_path: Path) -> None:
    made = images.Images(tmp_path, TINY)
    dealt = []
    for depth in (1, 3):
        chain = made.chain(depth)
        assert len(chain.diffs) == depth
        dealt.append(sorted(n for n, page in enumerate(_merged(chain)) if page is not None))
    assert dealt[0] == dealt[1] == sorted(made.dirty)
    assert all(right - left > 1 for left, right in zip(dealt[0], dealt[0][1:], strict=False))
    assert made.verify(made.flat) == made.verify(made.flat)
    with made.flat.open("r+b") as file:
        file.write(b"?")
    with pytest.raises(NotMeasured, match="shows wrong bytes at 0"):
        made.verify(made.flat)


def _merged(chain: images.Chain) -> list[bytes | None]:
    pages: list[bytes | None] = [None] * (TINY.image // measure.PAGE)
    for diff in chain.diffs:
        raw = diff.read_bytes()
        for n in range(len(pages)):
            page = raw[n * measure.PAGE : (n + 1) * measure.PAGE]
            if any(page):
                assert pages[n] is None
                pages[n] = page
    return pages


# (e) The floor of flattening


@pytest.mark.parametrize("kind", goals.SHARING)
def test_the_sharing_from_c_gives_the_merged_bytes(kind: str, tmp_path: Path) -> None:
    # Blocks of the diffs overlap; the last one ends with the file, inside a block.
    block, size = 1 << 16, (1 << 20) - 100
    layers = {"base": range(0, 12), "old": (1, 3, 4, 15), "new": (2, 3, 13)}
    merged = bytearray(size)
    with loopfs.made(kind, tmp_path) as root:
        paths = [root / name for name in layers]
        for path, (name, places) in zip(paths, layers.items(), strict=True):
            with path.open("wb", buffering=0) as file:
                file.truncate(size)
                for at in (place * block for place in places):
                    content = f"{name} {at:8}".encode().ljust(16) * (block // 16)
                    merged[at : at + block] = content[: size - at]
                    os.pwrite(file.fileno(), content[: size - at], at)
        before = [path.read_bytes() for path in paths]
        out = root / "out"
        programs.run([programs.compiled("copier"), "reflink", out, *paths])
        assert out.read_bytes() == merged
        assert [path.read_bytes() for path in paths] == before


def test_the_sharing_from_c_copies_nothing_where_blocks_cannot_be_shared(tmp_path: Path) -> None:
    with loopfs.made("ext4", tmp_path) as root:
        (root / "base").write_bytes(b"base" * 4096)
        (root / "diff").write_bytes(b"diff" * 4096)
        names = [root / name for name in ("out", "base", "diff")]
        with pytest.raises(NotMeasured, match="FICLONE"):
            programs.run([programs.compiled("copier"), "reflink", *names])


# (f) Profiles

_PERF = """
 600        |   41:python    |libpython3.11.so.1.0                 |[.] _PyEval_EvalFrameDefault
 200        |   41:python    |[kernel.kallsyms]                    |[k] finish_task_switch.isra.0
 50         |   43:trio-7    |[kernel.kallsyms]                    |[k] finish_task_switch.isra.0
 30         |   41:python    |{pyfuse3}|[.] __pyx_gb_7pyfuse3_94generator30
 3          |   41:python    |libfuse3.so.3.14.0                   |[.] 0x0000000000012f10
 4          |   41:python    |libfuse3.so.3.14.0                   |[.] 0x0000000000012f20
 9          |   41:python    |_json.cpython-311-x86_64-linux-gnu.so|[.] encoder
 80         |   77:client    |[fuse]                               |[k] fuse_simple_request
 20         |   77:client    |client                               |[.] touch
 1          |   77:client    |libc.so.6                            |[.] operator new(unsigned long)
 500        |    0:swapper   |[kernel.kallsyms]                    |[k] pv_native_safe_halt
 7          |   90:python    |libpython3.11.so.1.0                 |[.] _PyEval_EvalFrameDefault
# 12        |   41:python    |a comment
Warning: 3 samples | were lost | and so on
""".replace("{pyfuse3}", Path(pyfuse3.__file__).name)


def test_what_perf_printed_is_read() -> None:
    hits = profile.parse(_PERF)
    assert sum(hit.samples for hit in hits) == 1504
    assert profile.Hit(50, 43, "trio-7", "kernel", "finish_task_switch.isra.0") in hits
    assert profile.Hit(4, 41, "python", "libfuse", "(no symbol)") in hits
    assert profile.Hit(20, 77, "client", "its own code", "touch") in hits
    assert profile.Hit(1, 77, "client", "libc", "operator new(unsigned long)") in hits
    assert [hit.module for hit in hits if hit.thread == 41] == (
        ["Python", "kernel", "pyfuse3", "libfuse", "libfuse", "_json"]
    )
    assert profile.parse("") == profile.parse("no samples!\n") == []


def _profile() -> dict[str, Any]:
    hits = profile.parse(_PERF)
    sides = {
        "server": [hit for hit in hits if hit.thread in (41, 43)],
        "client": [hit for hit in hits if hit.command == "client"],
    }
    # 997 samples of 250 us in 5,000 requests of 50 us each.
    return profile.summary(sides, 5000, 0.25)


def test_a_profile_tells_the_time_of_a_request_by_module_and_by_symbol() -> None:
    found = _profile()
    assert (found["requests"], found["us"]) == (5000, 50.0)
    assert found["modules"] == {
        "server: Python": 30.0,
        "server: kernel": 12.5,
        "client: kernel": 4.0,
        "server: pyfuse3": 1.5,
        "client: its own code": 1.0,
        "server: other": 0.8,
        "client: other": 0.05,
    }
    assert found["symbols"][1] == {
        "symbol": "finish_task_switch.isra.0",
        "in": "server: kernel",
        "us": 12.5,
    }
    assert len(found["symbols"]) == 8
    assert json.loads(json.dumps(found)) == found


def test_the_page_shows_the_profiles_side_by_side() -> None:
    document = copy.deepcopy(FIXED)
    floor = {"requests": 9, "us": 10.0, "modules": {"server: kernel": 9.0}, "symbols": []}
    document["cases"]["threads"]["facts"][profile.PROFILE] = {"ours": _profile(), "floor": floor}
    lines = report.text(document, {}).splitlines()
    at = lines.index("| in | ours | floor |")
    assert lines[at + 1 : at + 4] == [
        "|---|---|---|",
        "| server: Python | 30 us, 60 % | - |",
        "| server: kernel | 12.5 us, 25 % | 9 us, 90 % |",
    ]
    assert "| rest | 0.15 us, 0 % | 1 us, 10 % |" in lines
    assert "| all | 50 us, 100 % | 10 us, 100 % |" in lines
    assert "| ours | `_PyEval_EvalFrameDefault` | server: Python | 30 | 60 |" in lines
    assert not [line for line in lines if line.startswith("- profile")]


def test_the_page_says_whose_time_a_profile_shows() -> None:
    document = copy.deepcopy(FIXED)
    for name in ("cached", "flatten-xfs"):
        document["cases"].setdefault(name, copy.deepcopy(document["cases"]["threads"]))
        document["cases"][name]["facts"][profile.PROFILE] = {"x": _profile()}
    text = report.text(document, {})
    assert "Where the time of a page goes that is read from the page cache" in text
    assert "Where the time goes of an extent that is shared" in text


def test_a_program_is_profiled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def perf(command: Any, timeout: float) -> str:
        asked.append([str(word) for word in command])
        return "0.004\n0.001\n" if "record" in command else _PERF

    monkeypatch.setattr(profile, "need", lambda name: name)
    monkeypatch.setattr(profile, "run", perf)
    found = profile.program(["/bench/client", "read", "file"], 100)
    assert asked[0][-3:] == ["/bench/client", "read", "file"] and "-a" not in asked[0]
    assert (found["requests"], found["us"]) == (100, 50.0)
    assert found["modules"] == {
        "program: kernel": 200.0,
        "program: its own code": 50.0,
        "program: libc": 2.5,
    }
    with pytest.raises(NotMeasured, match="saw nothing of other"):
        profile.program(["other"], 1)


def test_where_perf_is_not_to_be_had_only_the_profiles_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "perf" else name)
    with pytest.raises(NotMeasured, match="perf is not installed"):
        profile.touches(["client"], 1, 0, [os.getpid()])

    def refused(*_: object) -> None:
        raise NotMeasured("perf ended with status 255: no permission")

    monkeypatch.setattr(profile, "touches", refused)
    monkeypatch.setattr(read_cases, "warm_layers", lambda images: None)
    record = Record("random-one-cpu", "tiny")
    server = Server("diffmergefs", tmp_path / "image", tmp_path)
    read_cases.note_profiles([server], images.Images(tmp_path, TINY), record)
    assert record.missing == {"profile of diffmergefs": "perf ended with status 255: no permission"}
    assert profile.PROFILE not in record.facts


# (g) The whole, with the smallest sizes


@pytest.mark.parametrize("only", ["nothing", "index,nothing"])
def test_a_case_that_there_is_not_is_a_mistake(
    only: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--scale", "tiny", "--only", only]) == 2
    assert "no case nothing; see --list" in capsys.readouterr().err


def test_the_names_of_the_cases_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--list"]) == 0
    names = capsys.readouterr().out.split()
    assert {"sequential", "restore-512", "restore-4096", "flatten-btrfs", "index"} <= set(names)


def test_a_run_writes_its_figures_and_its_page(tmp_path: Path) -> None:
    skips.require_loop()
    skips.require_fuse()
    path = tmp_path / "benchmarks.json"
    cases = ["sequential", "slow-store", "faults", "flatten-tmpfs", "mount-time", "index"]
    status = bench.main(["--scale", "tiny", "--only", ",".join(cases), "--json", str(path)])
    document = report.load(path)
    assert list(document["cases"]) == cases
    missing = [case["missing"] for case in document["cases"].values()]
    # nbdkit is not among the packages of the tests; all else is.
    assert [set(reasons) - {"nbdkit + nbdfuse"} for reasons in missing] == [set()] * len(cases)
    assert status == int(any(missing))
    for case in document["cases"].values():
        assert case["scale"] == "tiny" and case["series"]
        for series in case["series"].values():
            assert len(series["values"]) == TINY.rounds and series["unit"]
            assert all(value > 0 for value in series["values"])
    shown = set(document["cases"]["sequential"]["series"])
    assert {"diffmergefs", "diffmergefs, depth 1", "qemu export", "C floor"} <= shown
    assert {"pyfuse3 constant", "flattened, warm", "diffmergefs, 8 x 100"} <= shown
    assert set(document["cases"]["faults"]["series"]) == {goals.OURS, goals.FLOOR, goals.ALLOWED}
    assert set(document["cases"]["flatten-tmpfs"]["series"]) > set(goals.WAYS)
    assert path.with_suffix(".md").read_text(encoding="utf-8").startswith("# Benchmarks")


def test_a_run_restores_firecrackers(tmp_path: Path) -> None:
    """Several at once: the case of one VM does the same, and measures the same but for the Pss."""
    skips.require_fuse()
    firecracker.programs()
    path, case = tmp_path / "benchmarks.json", "firecracker-many"
    assert bench.main(["--scale", "tiny", "--only", case, "--json", str(path)]) == 0
    found = report.load(path)["cases"][case]["series"]
    names = [goals.WARM, goals.CACHED, goals.COLD, goals.RECORDED]
    names += [goals.UFFD, goals.UFFD_RECORDED, goals.UFFD_HUGE]
    names += [goals.COLD_BESIDE, goals.FLATTEN_FIRST]
    figures = (goals.REPLY, goals.SUM, goals.PSS)
    assert list(found) == [f"{name}: {figure}" for name in names for figure in figures]
    for series in found.values():
        assert len(series["values"]) == TINY.rounds
        assert all(value > 0 for value in series["values"])
    for goal in GOALS:
        if goal.over.case.startswith("firecracker"):
            assert goal.under and {*goal.over.names, *goal.under.names} <= set(found)


def test_a_firecracker_that_cannot_be_had_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Path:
        raise firecracker.FirecrackerUnavailableError("no /dev/kvm")

    monkeypatch.setattr(firecracker, "fetched", refuse)
    with pytest.raises(NotMeasured, match="no Firecracker: no /dev/kvm"):
        microvms.take_apart(tmp_path / "microvm")
