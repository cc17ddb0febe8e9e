"""Who serves a mount, as its status tells it."""

from __future__ import annotations

import os
import socket

import pytest

from diffmergefs.fuse.service import Service
from diffmergefs.fuse.status import METRICS_FILE, Metrics, Status, rendered, status_of
from diffmergefs.system.board import Board
from diffmergefs.system.line import Line
from tests.support.counters import NOTHING, metric_families


def line_of(number: int, keeper: int) -> Line:
    """The line of this server, whose keeper is that process."""
    mine, end = socket.socketpair()
    mine.close()
    line = Line(
        number=number,
        signals=(),
        held={},
        suspects=frozenset(),
        poisoned={},
        reason="it died",
        dump="",
        board=Board(),
        end=end,
    )
    line.keeper = keeper
    line.board["longest_ns"] = 21_000_000
    end.close()
    return line


@pytest.mark.parametrize(
    ("keeper", "resends", "obstacle"),
    [
        (os.getppid(), True, ""),
        (os.getppid(), False, "Linux before 6.9"),
        (1 << 30, True, "its keeper is gone"),
    ],
    ids=["covered", "an old kernel", "without a keeper"],
)
def test_it_is_told_who_serves_and_whether_another_would_go_on(
    keeper: int, resends: bool, obstacle: str
) -> None:
    service = Service.of(line_of(3, keeper), resends=resends)
    assert service == Service(
        keeper=keeper,
        server=os.getpid(),
        servers=3,
        last_end="it died",
        longest_stall_seconds=0.021,
        covered=not obstacle,
        obstacle=obstacle,
    )
    found = status_of(Metrics(), **NOTHING, service=service)
    assert (found.pid, found.service) == (keeper, service)
    assert Status.from_json(found.to_json()) == found
    text = rendered(METRICS_FILE, found).decode()
    numbers = {s.name: s.value for family in metric_families(text) for s in family.samples}
    assert numbers["diffmergefs_servers_total"] == 3
    assert numbers["diffmergefs_longest_stall_seconds"] == 0.021
    assert numbers["diffmergefs_covered"] == (not obstacle)
