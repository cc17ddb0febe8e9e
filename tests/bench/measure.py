"""What a run of the benchmark measures: its sizes, its records, its rounds."""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from diffmergefs.core import sparse
from diffmergefs.core.sparse import page_aligned

SCHEMA = 1
MIB = 1 << 20
PAGE = 4096

CASE_SECONDS = 900

#: The fact that tells whether the machine was quiet.
OTHERS = "% of the processors' time that other programs took"


class NotMeasured(Exception):
    """Something cannot be measured here; the message is the reason."""


class CaseTooLong(BaseException):
    """The time of a whole case is up. No part of the case takes this for a failure of its own."""


@dataclass(frozen=True)
class Scale:
    """How much of everything: the sizes of the images, and how often each is measured."""

    name: str
    rounds: int
    """Counted rounds; one more comes before them and is thrown away."""
    long_rounds: int
    """The same where one round takes many seconds."""
    restore_rounds: int
    """The same of restores of the smallest guest, which take moments; their spreads are wide."""
    image: int
    """Bytes of the image that is read."""
    dirty_pages: int
    depths: tuple[int, ...]
    touches: int
    """Pages that one thread touches; of eight threads, each a quarter of it."""
    readaheads: tuple[int, ...]
    """KiB that are tried to find each server's best."""
    snapshots: int
    snapshot_size: int
    """Bytes of each of `snapshots` snapshots, which have `dirty_pages` extents each."""
    chains: int
    """Chains of four of those diffs that are opened at once."""
    index_extents: int
    filesystems: tuple[str, ...]
    guests: tuple[int, ...]
    """MiB of the guests that are restored, the smallest first."""
    together: int
    """VMs at once on one view."""
    slow_reads: int
    """Reads of each client of the slow store."""
    holds_memory: bool = False
    """Whether free memory is held, or touched, where it would decide the numbers: it takes long."""


FULL = Scale(
    name="full",
    rounds=7,
    long_rounds=3,
    restore_rounds=25,
    image=1024 * MIB,
    dirty_pages=13_000,
    depths=(1, 3, 8, 32),
    touches=8_000,
    readaheads=(128, 512, 1024, 4096),
    snapshots=100,
    snapshot_size=2048 * MIB,
    chains=16,
    index_extents=1_000_000,
    filesystems=("ext4", "xfs", "btrfs", "tmpfs"),
    guests=(512, 4096),
    together=8,
    slow_reads=40,
    holds_memory=True,
)
QUICK = Scale(
    name="quick",
    rounds=2,
    long_rounds=1,
    restore_rounds=2,
    image=128 * MIB,
    dirty_pages=1_500,
    depths=(1, 32),
    touches=1_000,
    readaheads=(1024,),
    snapshots=20,
    snapshot_size=512 * MIB,
    chains=4,
    index_extents=100_000,
    filesystems=("ext4", "tmpfs"),
    guests=(512,),
    together=2,
    slow_reads=10,
)
TINY = Scale(
    name="tiny",
    rounds=2,
    long_rounds=1,
    restore_rounds=2,
    image=8 * MIB,
    dirty_pages=100,
    depths=(1, 3),
    touches=50,
    readaheads=(128,),
    snapshots=3,
    snapshot_size=8 * MIB,
    chains=1,
    index_extents=1_000,
    filesystems=("tmpfs",),
    guests=(128,),
    together=2,
    slow_reads=2,
)
SCALES = {scale.name: scale for scale in (FULL, QUICK, TINY)}


@dataclass
class Record:
    """The raw results of one case: series of numbers, facts, and what is missing and why."""

    case: str
    scale: str
    when: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0
    """How long the case took."""
    series: dict[str, dict[str, Any]] = field(default_factory=dict)
    """name -> {"unit": "s", "values": [...]}, a value for each counted round."""
    facts: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Series that could not be measured, or "" for the whole case -> the reason."""

    def add(self, name: str, unit: str, value: float) -> None:
        """One more value of a series."""
        series = self.series.setdefault(name, {"unit": unit, "values": []})
        series["values"].append(value)

    def miss(self, name: str, error: BaseException | str) -> None:
        """Note that a series, or with "" the case, is not measured, and what was the matter."""
        reason = str(error) if isinstance(error, NotMeasured | str) else _one_line(error)
        self.missing[name] = reason
        say(f"    not measured: {name or self.case}: {reason}")
        if not isinstance(error, NotMeasured | str):
            traceback.print_exception(error, file=sys.stderr)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


Figures = Mapping[str, tuple[str, float]]
"""The numbers that one run gave: the series' name -> its unit and the value."""


@dataclass(frozen=True)
class Contestant:
    """One that is measured in each round; `run` gives its numbers, and may raise."""

    name: str
    run: Callable[[], Figures]


def alternate(
    record: Record,
    contestants: Sequence[Contestant],
    rounds: int,
    before_run: Callable[[], object] = lambda: None,
) -> None:
    """Run each once a round, in an order that changes by chance; the first round is not counted.

    (In one that only moves on, each would come after the same other, whose traces in the machine's
    memory it meets.) `before_run` is called right before each of them: a machine that gives its
    memory back takes out of the page cache, within seconds, what nobody reads (seen: DAMON's
    pageout). Who fails is noted as missing and left out from then on, with all its numbers. The
    record's series are in the order of the contestants.
    """
    running = list(contestants)
    counted: dict[str, list[Figures]] = {contestant.name: [] for contestant in contestants}
    try:
        for number in range(rounds + 1):
            for contestant in random.Random(number).sample(running, len(running)):
                try:
                    before_run()
                    figures = contestant.run()
                except Exception as error:
                    record.miss(contestant.name, error)
                    running.remove(contestant)
                    continue
                if number:
                    counted[contestant.name].append(figures)
    finally:
        for contestant in running:
            for figures in counted[contestant.name]:
                for name, (unit, value) in figures.items():
                    record.add(name, unit, value)


def warm(*paths: Path) -> None:
    """Have the page cache hold the data of these files; their holes are not read."""
    buffer = page_aligned(MIB)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            fd = file.fileno()
            for start, stop in sparse.data_extents(fd, os.fstat(fd).st_size):
                for offset in range(start, stop, MIB):
                    os.preadv(fd, [buffer[: min(MIB, stop - offset)]], offset)


@contextmanager
def little_free(room: int) -> Iterator[None]:
    """Inside, all memory that was free is held, but for `room` bytes.

    So what one run frees is what the next one gets. A virtual machine may give memory that is free
    for seconds back to its host (free page reporting), and whoever gets that next waits 2 s a GiB
    for it, several times as long as its copy takes: who that was decided the numbers.
    """
    with _touched(os.sysconf("SC_AVPHYS_PAGES") * PAGE - room):
        yield


def touch_free(size: int) -> None:
    """Get so much memory and free it, so that the next who gets it waits for no host."""
    with _touched(size):
        pass


@contextmanager
def _touched(size: int) -> Iterator[None]:
    with mmap.mmap(-1, max(size, PAGE)) as memory:
        for start in range(0, size, PAGE):
            memory[start] = 1
        yield


def drop(path: Path) -> None:
    """Have the page cache forget a file's clean pages that nobody maps."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def say(text: str) -> None:
    """Tell whoever waits how far it is."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


class Results:
    """The JSON file: the machine, and the record of each case that was ever run into it.

    A case that is run again takes the place of its old record; the others stay.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cases: dict[str, Any] = {}
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known.get("schema") == SCHEMA:
                self.cases = known["cases"]

    def put(self, record: Record, machine: Mapping[str, Any]) -> None:
        """Write the record, and the machine that it was taken on, to the file."""
        self.cases[record.case] = asdict(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        document = {"schema": SCHEMA, "machine": machine, "cases": self.cases}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)


def run_case(name: str, scale: Scale, body: Callable[[Record], None]) -> Record:
    """The record of a case, whatever happened in it; an interrupt ends the run all the same.

    One that takes longer than 15 minutes is ended. To be called in the main thread.
    """
    record = Record(name, scale.name)
    say(name)
    began, others = time.monotonic(), _others_seconds()
    # Whose timer and handler stood there before gets them back: a test's limit, for one.
    handler = signal.signal(signal.SIGALRM, _too_long)
    left, _ = signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        body(record)
    except CaseTooLong as error:
        record.miss("", str(error))
    except Exception as error:
        record.miss("", error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)
    record.seconds = round(time.monotonic() - began, 1)
    room = max(0.1, record.seconds) * (os.cpu_count() or 1)
    record.facts[OTHERS] = round(max(0.0, _others_seconds() - others) / room * 100)
    say(f"{name}: {record.seconds} s")
    return record


def _others_seconds() -> float:
    # The processors' time that was not idle, nor this process's, nor its ended children's. What the
    # hypervisor kept for itself is in it, and kernel threads such as those of loop devices.
    line = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
    user, nice, system, _idle, _wait, *rest = map(int, line.split()[1:9])
    busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy - sum(usage.ru_utime + usage.ru_stime for usage in used)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise CaseTooLong(f"the case took longer than {CASE_SECONDS} s")
