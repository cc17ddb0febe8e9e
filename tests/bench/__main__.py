"""The benchmark: ``python -m tests.bench``, for `make bench` and `make bench-quick`.

Writes the raw results to a JSON file, and a page with plots from that file alone. Cases that are
run again take the place of their old results, so that a run can be done by parts.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tests.bench import machine, report
from tests.bench.cases import Bench, topics
from tests.bench.measure import SCALES, Results, run_case, say

_ROOT = Path(__file__).parents[2]
_WHERE = {"full": _ROOT / "docs" / "benchmarks.json"}
_BUILD = _ROOT / "build"


def main(arguments: Sequence[str]) -> int:
    """0 if all was measured, 1 if something was not (the page has the reasons), 2: usage."""
    given = _parser().parse_args(arguments)
    scale = SCALES[given.scale]
    found = topics(scale)
    known = [name for topic in found for name in topic]
    if given.list:
        print("\n".join(known))
        return 0
    path = given.json or _WHERE.get(scale.name, _BUILD / f"bench-{scale.name}" / "benchmarks.json")
    if not given.report_only:
        wanted = given.only.split(",") if given.only else known
        if unknown := set(wanted) - set(known):
            print(f"bench: no case {', '.join(sorted(unknown))}; see --list", file=sys.stderr)
            return 2
        if os.geteuid():
            print("bench: run it as root: it mounts filesystems, drops caches", file=sys.stderr)
            return 2
        signal.signal(signal.SIGTERM, _interrupt)
        with tempfile.TemporaryDirectory(prefix="bench-", dir=given.directory) as name:
            bench = Bench(scale, Path(name))
            try:
                missing = _run(bench, wanted, Results(path))
            except KeyboardInterrupt:
                print(f"bench: interrupted; cases that were done are in {path}", file=sys.stderr)
                return 130
            finally:
                bench.close()
    else:
        missing = False
    page = report.write(path)
    print(page)
    return int(missing)


def _run(bench: Bench, wanted: Sequence[str], results: Results) -> bool:
    # Whether something could not be measured.
    facts, missing = machine.facts(), False
    for topic in topics(bench.scale):
        for name, case in topic.items():
            if name in wanted:
                record = run_case(name, bench.scale, lambda record: case(bench, record))  # noqa: B023
                results.put(record, facts)
                missing = missing or bool(record.missing)
        bench.clear()
    say("something was not measured" if missing else "all was measured")
    return missing


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # so that all that was started is ended


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench BENCH_ARGS=...", description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="full", help="how much of everything")
    parser.add_argument("--only", metavar="CASE,...", help="these cases only")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--json", type=Path, help="the file of the raw results")
    parser.add_argument("--directory", type=Path, help="make the images here, not in $TMPDIR")
    parser.add_argument(
        "--report-only", action="store_true", help="write the page, measure nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
