"""A push: which of its ranges were requested, and how its pages get to the kernel."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from diffmergefs.core.extents import Extent, ExtentList
from diffmergefs.fuse.access import Access
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.opening.images import open_chain
from diffmergefs.prefetch.push import GuardedNotify, Notify, Push
from tests.support.images import PAGE, overlay_oracle, signed, write_layer

LAYERS = [[(0, signed(0, 0, 4 * PAGE))], [(PAGE, signed(1, PAGE, PAGE))]]
ORACLE = overlay_oracle(4 * PAGE, LAYERS)
WANTED = [Extent(PAGE // 2, 2 * PAGE), Extent(3 * PAGE, 4 * PAGE)]


@pytest.fixture
def push(tmp_path: Path) -> Push:
    base, diff = (write_layer(tmp_path / str(n), 4 * PAGE, layer) for n, layer in enumerate(LAYERS))
    return Push(OpenImage.of(open_chain(base, [diff]).view, "memory", Access(0, 0, 0o400)), 42)


@pytest.mark.parametrize(
    ("requests", "hits"),
    [
        ([], 2500),
        ([(0, 1000)], 2500),  # ends where the first begins
        ([(2000, 3000)], 2500),  # between the two
        ([(1999, 1)], 1500),
        ([(5000, 1), (6000, 100)], 1000),
        ([(1500, 4000)], 0),
    ],
)
def test_a_range_that_no_reader_requested_is_a_hit(
    push: Push, requests: list[tuple[int, int]], hits: int
) -> None:
    push.note(0, 1 << 40)  # before the ranges are known: it cannot be counted
    push.wanted = ExtentList([(1000, 2000), (5000, 6500)])
    for offset, length in requests:
        push.note(offset, length)
    assert push.hit_bytes() == 0
    push.whole = True
    assert push.hit_bytes() == hits


def test_notify_gives_the_kernel_the_merged_bytes_of_each_range(push: Push) -> None:
    calls: list[tuple[int, int, bytes]] = []
    notify = Notify(lambda inode, offset, data: calls.append((inode, offset, bytes(data))))
    assert list(notify.populate(push, WANTED)) == [stop - start for start, stop in WANTED]
    assert calls == [(42, start, ORACLE[start:stop]) for start, stop in WANTED]
    assert not notify.is_own(1)


def test_a_cancelled_push_gives_nothing_more(push: Push) -> None:
    calls: list[int] = []
    notify = Notify(lambda inode, offset, data: calls.append(offset))
    for _ in notify.populate(push, WANTED):
        push.cancelled = True
    assert calls == [WANTED[0].start]


class Otherwise:
    """A method that has only a process of its own, 7."""

    def populate(self, push: Push, wanted: Sequence[Extent]) -> Generator[int, None, None]:
        yield -1

    def is_own(self, pid: int) -> bool:
        return pid == 7


@pytest.mark.parametrize("fails", [False, True])
def test_the_guard_is_started_once_and_decides_on_the_method(push: Push, fails: bool) -> None:
    starts: list[str] = []

    def start() -> None:
        starts.append("")
        if fails:
            raise OSError("no guard")

    method = GuardedNotify(Notify(lambda *_: None), Otherwise(), start)
    assert not starts
    for _ in range(2):
        expected = [-1] if fails else [stop - start for start, stop in WANTED]
        assert list(method.populate(push, WANTED)) == expected
    assert len(starts) == 1
    assert method.is_own(7) and not method.is_own(8)
