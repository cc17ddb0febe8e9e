"""Many snapshots at once: how soon they are there, and what the daemon needs for them."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from diffmergefs.core.extents import ExtentList, SegmentMap
from tests.bench import servers
from tests.bench.images import Store
from tests.bench.index import scattered
from tests.bench.measure import (
    MIB,
    PAGE,
    Contestant,
    Figures,
    NotMeasured,
    Record,
    Scale,
    alternate,
    say,
)
from tests.bench.programs import compiled, run
from tests.support import mounttable

_LAYERS = 4
_ALONE_SECONDS = 1.0
_TENTHS = 10
_CLIENTS = 16
_KILLS = 20
_BETWEEN_SECONDS = 0.3


def mount_time(store: Store, scale: Scale, record: Record) -> None:
    """From the command to its return, which is when the mount answers; and with nothing in it."""
    empty = store.directory.parent / "empty"
    empty.mkdir(exist_ok=True)
    point = store.directory.parent / "mounted"
    point.mkdir(exist_ok=True)

    def mounting(name: str, source: Path, tags: int) -> Figures:
        state = f"--state-dir={store.directory.parent}/state"
        command = [sys.executable, "-m", "diffmergefs", "mount", state, str(source), str(point)]
        began = time.perf_counter()
        try:
            run(command)
            seconds = time.perf_counter() - began
            shown = len(os.listdir(point))
        finally:
            _unmount(point)
        if shown != tags:
            raise NotMeasured(f"{shown} snapshots are shown, not {tags}")
        return {name: ("s", seconds)}

    runs = [
        Contestant("empty", partial(mounting, "empty", empty, 0)),
        Contestant("full", partial(mounting, "full", store.directory, len(store.tags))),
    ]
    alternate(record, runs, scale.rounds)
    record.facts["snapshots"] = len(store.tags)


def _unmount(point: Path) -> None:
    while mounttable.at(os.path.realpath(point)):
        mounttable.unmount(os.path.realpath(point))


def reads_go_on(store: Store, scale: Scale, record: Record) -> None:
    """One client looks at all snapshots for the first time while another reads an image."""
    alternate(record, [Contestant("reads", partial(_look, store))], scale.long_rounds)


def _look(store: Store) -> Figures:
    # The image that is read lies in another chain than most.
    shows = f"{store.tips[-1]}/memory.bin"
    with ExitStack() as stack:
        view = stack.enter_context(
            servers.diffmergefs(store.directory.parent, store.directory, shows=shows)
        )
        command = [str(compiled("client")), "watch", str(view.file), "600"]
        said = stack.enter_context(tempfile.TemporaryFile("w+"))
        reader = subprocess.Popen(command, stdout=said)
        try:
            time.sleep(_ALONE_SECONDS)
            began = time.monotonic()
            looker = "import os, sys; [os.stat(path) for path in sys.argv[1:]]"
            paths = [view.point / tag / "memory.bin" for tag in store.tags]
            run([sys.executable, "-c", looker, *paths])
            ended = time.monotonic()
        finally:
            reader.terminate()
            reader.wait(60)
        said.seek(0)
        reads = [tuple(map(float, line.split())) for line in said]
    alone = [took for at, took in reads if at < began]
    during = [(at, took) for at, took in reads if began <= at <= ended]
    if not alone or not during:
        raise NotMeasured(f"{len(alone)} reads alone, {len(during)} beside the looks")
    tenths = {int((at - began) / (ended - began) * _TENTHS) for at, _ in during}
    return {
        "looking at all": ("s", ended - began),
        "reads alone": ("reads/s", len(alone) / _ALONE_SECONDS),
        "reads meanwhile": ("reads/s", len(during) / (ended - began)),
        "longest read alone": ("ms", max(alone) * 1e3),
        "longest read meanwhile": ("ms", max(took for _, took in during) * 1e3),
        "tenths of that time with reads": ("of 10", len(tenths & set(range(_TENTHS)))),
    }


def kills(store: Store, scale: Scale, record: Record) -> None:
    """A client's longest read over each kill of the server, beyond its longest without kills."""
    runs = [
        Contestant(f"{clients} client{'s' if clients > 1 else ''}, {images} open", measure)
        for clients, images in ((1, 1), (_CLIENTS, 1), (1, len(store.tips)))
        for measure in [partial(_kill, store, clients, images)]
    ]
    alternate(record, runs, scale.long_rounds)


def _kill(store: Store, clients: int, images: int) -> Figures:
    with ExitStack() as stack:
        shows = f"{store.tips[-1]}/memory.bin"
        view = stack.enter_context(
            servers.diffmergefs(store.directory.parent, store.directory, shows=shows)
        )
        for tag in store.tips[-images:]:
            path = view.point / tag / "memory.bin"
            stack.enter_context(path.open("rb", buffering=0)).read(PAGE)
        reads = stack.enter_context(_watching(view.file, clients))
        time.sleep(_ALONE_SECONDS)
        times = [time.monotonic()]
        for _ in range(_KILLS):
            os.kill(view.pid, signal.SIGKILL)
            time.sleep(_BETWEEN_SECONDS)
            times.append(time.monotonic())
        found = reads()
    alone = max(took for at, took in found if at < times[0])
    stalls = [
        max((took for at, took in found if began <= at < ended), default=ended - began)
        for began, ended in itertools.pairwise(times)
    ]
    name = f"{clients} client{'s' if clients > 1 else ''}, {images} open"
    return {
        f"{name}: median": ("ms", max(0.0, statistics.median(stalls) - alone) * 1e3),
        f"{name}: longest": ("ms", max(0.0, max(stalls) - alone) * 1e3),
        f"{name}: without kills": ("ms", alone * 1e3),
    }


@contextmanager
def _watching(file: Path, clients: int) -> Iterator[Callable[[], list[tuple[float, float]]]]:
    # Clients that read; a function that ends them, and gives when each read ended and its seconds.
    command = [str(compiled("client")), "watch", str(file), "600"]
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(clients)]
        readers = [subprocess.Popen(command, stdout=out) for out in said]

        def ended() -> list[tuple[float, float]]:
            found = []
            for reader, out in zip(readers, said, strict=True):
                reader.terminate()
                if reader.wait(60) != 0:
                    raise NotMeasured(f"a client failed: {reader.returncode}")
                out.seek(0)
                for line in out:
                    at, took = map(float, line.split())
                    found.append((at, took))
            return found

        try:
            yield ended
        finally:
            for reader in readers:
                reader.kill()
                reader.wait()


def memory(store: Store, scale: Scale, record: Record) -> None:
    """The daemon's memory with many chains open, of which some pages were read."""

    def measure() -> Figures:
        shows = f"{store.tips[0]}/memory.bin"
        with ExitStack() as stack:
            view = stack.enter_context(
                servers.diffmergefs(store.directory.parent, store.directory, shows=shows)
            )
            before = view.resident()
            for tag in store.tips[: scale.chains]:
                path = view.point / tag / "memory.bin"
                file = stack.enter_context(path.open("rb", buffering=0))
                for offset in range(0, scale.snapshot_size, scale.snapshot_size // 64):
                    os.pread(file.fileno(), PAGE, offset)
            after = view.resident()
            stack.pop_all().close()
        return {"nothing open": ("MiB", before / MIB), "all open": ("MiB", after / MIB)}

    record.facts["chains"] = len(store.tips[: scale.chains])
    record.facts["segments of each"] = 2 * 4 * scale.dirty_pages
    alternate(record, [Contestant("daemon", measure)], scale.long_rounds)


def index(scale: Scale, record: Record) -> None:
    """The merge of four layers of a million extents each into one map of segments."""
    say("    making extents")
    lists = [ExtentList(scattered(scale.index_extents, seed)) for seed in range(_LAYERS)]
    record.facts["extents of each layer"] = scale.index_extents

    def merge() -> Figures:
        began = time.perf_counter()
        segments = SegmentMap(lists)
        seconds = time.perf_counter() - began
        record.facts["segments"] = len(segments)
        each = segments.nbytes / len(segments)
        return {"merge": ("s", seconds), "memory of a segment": ("bytes", each)}

    alternate(record, [Contestant("index", merge)], scale.rounds)
