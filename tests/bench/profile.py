"""Where the time of a request, or of a part of a program's work, goes: by perf's samples."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.bench.measure import NotMeasured, Record
from tests.bench.programs import need, run

#: The fact of a case that holds its profiles, one a contestant: what is given here.
PROFILE = "profile"

#: Nanoseconds between two samples.
PERIOD = 250_000

_TIMEOUT = 60
_SYMBOLS = 8
_SMALL = 0.01  # of the time: a module that takes less has no row of its own

# perf says "[k] name" of the kernel and "[.] name" of a program; of a function for which its file
# has no symbol, the address.
_LINE = re.compile(
    r" *(?P<samples>\d+) *\| *(?P<thread>\d+):(?P<command>[^|]*?) *\|(?P<dso>[^|]*?) *\|"
    r"\[(?P<kind>.)\] (?P<symbol>.*?) *"
)
_MODULES = {r"(lib)?python\d": "Python", r"libfuse\d?\.so": "libfuse", r"libc[.-]": "libc"}


@dataclass(frozen=True)
class Hit:
    """So many samples of one thread in one function of one module."""

    samples: int
    thread: int
    command: str
    """The thread's name."""
    module: str
    """"kernel", "Python", "pyfuse3", "libfuse", "libc", "its own code" of the program that bears
    the thread's name, or the name of another object file."""
    symbol: str
    """Without a symbol in its object file, "(no symbol)"."""


def note(record: Record, name: str, take: Callable[[], Any]) -> None:
    """Take the profile of a contestant into the case's record, or the reason why there is none."""
    try:
        found = take()
    except Exception as error:
        record.miss(f"profile of {name}", error)
    else:
        record.facts.setdefault(PROFILE, {})[name] = found


def touches(command: Sequence[str | Path], count: int, cpu: int, pids: Sequence[int]) -> Any:
    """The profile of `count` requests that a client makes of the server processes `pids`.

    `command` is the client; it prints the seconds that its requests took, and does them on the
    processor `cpu`, to which the servers' threads are pinned too. What is given can be written as
    JSON: see `summary`. NotMeasured where perf is not there, is not permitted, or saw nothing of
    one of them.
    """
    perf, threads = need("perf"), _threads(pids)
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "perf.data"
        # All processors are recorded, since it is on another one that the client gets its name.
        record = [perf, "record", "-q", "-N", "-a", "-e", "cpu-clock", "-c", str(PERIOD)]
        recorded: list[str | Path] = [*_elsewhere(cpu), *record, "-o", data, "--", *command]
        printed = run(recorded, _TIMEOUT)
        threads |= _threads(pids)
        # Not perf's --pid and --comms: what several programs have in common it gives to one alone.
        report = [perf, "report", "-i", str(data), "-C", str(cpu), "--stdio", "-q"]
        hits = parse(run([*report, "-F", "sample,pid,dso,symbol", "-t", "|"], _TIMEOUT))
    client = Path(command[0]).name
    sides = {
        "server": [hit for hit in hits if hit.thread in threads],
        "client": [hit for hit in hits if hit.command == client],
    }
    for side, seen in sides.items():
        if not seen:
            raise NotMeasured(f"perf saw nothing of the {side}")
    return summary(sides, count, float(printed))


def program(command: Sequence[str | Path], count: int) -> Any:
    """The profile of a program that asks nobody, in `count` parts of its work: see `summary`.

    It prints the seconds that the work took, in one number or several, and runs on whatever
    processor. NotMeasured where perf is not there, is not permitted, or saw nothing of it.
    """
    perf, name = need("perf"), Path(command[0]).name
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "perf.data"
        record: list[str | Path] = [
            perf,
            "record",
            "-q",
            "-N",
            "-e",
            "cpu-clock",
            "-c",
            str(PERIOD),
            "-o",
            data,
        ]
        printed = run([*record, "--", *command], _TIMEOUT)
        report = [perf, "report", "-i", str(data), "--stdio", "-q"]
        hits = parse(run([*report, "-F", "sample,pid,dso,symbol", "-t", "|"], _TIMEOUT))
    seen = [hit for hit in hits if hit.command == name]
    if not seen:
        raise NotMeasured(f"perf saw nothing of {name}")
    return summary({"program": seen}, count, sum(map(float, printed.split())))


def _threads(pids: Iterable[int]) -> set[int]:
    return {int(thread) for pid in pids for thread in os.listdir(f"/proc/{pid}/task")}


def _elsewhere(cpu: int) -> list[str]:
    # perf itself, and what the client does before it pins itself to `cpu`, go to the other CPUs.
    others = os.sched_getaffinity(0) - {cpu}
    return [need("taskset"), "-c", ",".join(map(str, sorted(others)))] if others else []


def parse(text: str) -> list[Hit]:
    """What `perf report -F sample,pid,dso,symbol -t '|'` printed, which says of each its thread.

    A line of another form is no hit.
    """
    found = (_LINE.fullmatch(line) for line in text.splitlines())
    return [_hit(**line.groupdict()) for line in found if line]


def _hit(samples: str, thread: str, command: str, dso: str, kind: str, symbol: str) -> Hit:
    name = "(no symbol)" if re.fullmatch(r"0x[0-9a-f]+", symbol) else symbol
    module = "kernel" if kind == "k" else _module(dso)
    if module == command:
        module = "its own code"
    return Hit(int(samples), int(thread), command, module, name)


@cache
def _module(dso: str) -> str:
    for pattern, name in _MODULES.items():
        if re.match(pattern, dso):
            return name
    spec = importlib.util.find_spec("pyfuse3")
    if spec and spec.origin and Path(spec.origin).name == dso:
        return "pyfuse3"
    return re.split(r"\.(?:cpython|abi3|so)\b", dso)[0]


def summary(hits: Mapping[str, Sequence[Hit]], count: int, seconds: float) -> dict[str, Any]:
    """The samples of each side as microseconds of one of `count` requests, or parts of the work.

    A side is "server", "client" or "program". `requests`, that count, and `us`, what one took by
    the clock; `modules`: "side: module" -> its us, the greatest first; `symbols`: the eight
    greatest of all sides, each with `symbol`, `in` and `us`.
    The samples need not reach `us`: what the processor did for others, or not at all, and samples
    that came too late to be taken are in none.
    """

    def us(samples: int) -> float:
        return round(samples * PERIOD / 1000 / count, 2)

    whole = seconds / count * 1e6
    symbols: Counter[tuple[str, str]] = Counter()
    modules: Counter[str] = Counter()
    for place, hit in ((f"{side}: {hit.module}", hit) for side in hits for hit in hits[side]):
        symbols[place, hit.symbol] += hit.samples
        modules[place] += hit.samples
    for place, samples in list(modules.items()):
        if us(samples) < _SMALL * whole:
            modules[f"{place.split(':')[0]}: other"] += modules.pop(place)
    return {
        "requests": count,
        "us": round(whole, 2),
        "modules": {place: us(samples) for place, samples in modules.most_common()},
        "symbols": [
            {"symbol": symbol, "in": place, "us": us(samples)}
            for (place, symbol), samples in symbols.most_common(_SYMBOLS)
        ],
    }
