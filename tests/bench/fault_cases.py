"""One fault of a guest whose memory a page server fills, against a server of C."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tests.bench.goals import ALLOWED, FLOOR, OURS
from tests.bench.images import Images
from tests.bench.measure import Contestant, Figures, NotMeasured, Record, alternate
from tests.bench.programs import compiled, read_through, run
from tests.support import pageservers

_LAYERS = 3


def faults(images: Images, record: Record) -> None:
    """Random first touches, guest and server on one CPU, a page each, all layers cached."""
    touches, size = images.scale.touches, images.scale.image
    record.facts["diffs"] = _LAYERS
    chain = images.chain(_LAYERS)
    sums: dict[str, str] = {}

    def touch(name: str, socket: Path) -> Figures:
        command: list[str | Path] = [
            compiled("faults"),
            "guest",
            socket,
            str(size),
            str(touches),
            "11",
        ]
        seconds, sums[name] = run(command).split()
        if len(set(sums.values())) > 1:
            raise NotMeasured("the servers gave other bytes")
        found = float(seconds) / (touches - 1) * 1e6
        return {
            name: ("us", found),
            **({ALLOWED: ("us", 1.2 * found + 8)} if name == FLOOR else {}),
        }

    def warm() -> None:
        for path in (*chain.layers, images.flat):
            read_through(path, cold=False)

    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        ours = stack.enter_context(
            pageservers.serving(
                place / "ours", "--no-prefetch", "--fault-around=4K", *chain.options
            )
        )
        for thread in os.listdir(f"/proc/{ours.process.pid}/task"):
            os.sched_setaffinity(int(thread), [0])
        floor = stack.enter_context(_floor(place / "floor", images.flat))
        runs = [
            Contestant(name, partial(touch, name, socket))
            for name, socket in ((OURS, ours.socket), (FLOOR, floor))
        ]
        alternate(record, runs, images.scale.rounds, warm)


@contextmanager
def _floor(socket: Path, file: Path) -> Iterator[Path]:
    command = [str(compiled("faults")), "serve", str(socket), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise NotMeasured("the C server did not start")
            yield socket
        finally:
            process.kill()
