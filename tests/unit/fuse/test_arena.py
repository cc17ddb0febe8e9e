"""Things in memory that outlives its process: each at its place, and free memory given back."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.fuse.arena import Arena, Place
from diffmergefs.system.board import Board
from tests.support.forks import fork
from tests.support.images import PAGE

THINGS = st.one_of(st.binary(max_size=3 * 4096), st.lists(st.integers(), max_size=5), st.none())


@pytest.fixture
def arena() -> Iterator[Arena]:
    found = Arena(Board())
    yield found
    os.close(found._fd)


def taken(arena: Arena) -> int:
    return os.fstat(arena._fd).st_blocks * 512


@settings(deadline=None)
@given(st.lists(THINGS, max_size=12), st.data())
def test_what_is_not_freed_stays(things: list[object], draws: st.DataObject) -> None:
    arena = Arena(Board())
    try:
        places = [arena.put(thing) for thing in things]
        assert len(set(places)) == len(things)
        freed = draws.draw(
            st.sets(st.sampled_from(range(len(things)))) if things else st.just(set())
        )
        left = {
            place: thing
            for n, (place, thing) in enumerate(zip(places, things, strict=True))
            if n not in freed
        }
        if draws.draw(st.booleans()):
            for n in freed:
                arena.free(places[n])
        else:
            arena.free_all_but(left)
        for place, thing in left.items():
            assert arena.get(place) == thing
        assert taken(arena) == sum(-(-place.length // 4096) * 4096 for place in left)
        assert arena.put("new").start >= max((place.start for place in places), default=0)
        for place, thing in left.items():
            assert arena.get(place) == thing
    finally:
        os.close(arena._fd)


def test_no_place_is_used_twice(arena: Arena) -> None:
    places = []
    for _ in range(10):
        places.append(arena.put("thing"))
        arena.free(places[-1])
    assert len({place.start for place in places}) == 10


def test_a_thing_outlives_the_process_that_put_it(arena: Arena) -> None:
    first = arena.put("first")
    child = fork()
    if child == 0:
        arena.put("from the child")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    second = arena.put("second")
    between = Place(4096, arena.put("from the child").length)
    assert arena.get(between) == "from the child"
    assert (arena.get(first), arena.get(second)) == ("first", "second")
    arena.free_all_but([first, second])
    assert taken(arena) == 2 * 4096


def test_threads_put_side_by_side(arena: Arena) -> None:
    found: dict[Place, object] = {}

    def put(thread: int) -> None:
        for n in range(50):
            thing = thread, n, b"x" * (n * 100)
            found[arena.put(thing)] = thing

    threads = [threading.Thread(target=put, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    assert all(arena.get(place) == thing for place, thing in found.items())


def test_a_short_write_is_continued(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, text, at: pwrite(fd, bytes(text)[:7], at))
        place = arena.put(b"x" * 1000)
    assert arena.get(place) == b"x" * 1000


def test_without_memory_nothing_is_put(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    place = arena.put("before")

    def fails(*_: object) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails)
        with pytest.raises(OSError) as caught:
            arena.put("never")
    assert caught.value.errno == errno.ENOMEM
    assert arena.get(arena.put("after")) == "after" and arena.get(place) == "before"


def test_offsets_in_order_take_an_eighth_of_their_size(arena: Arena) -> None:
    pages = sorted(random.Random(1).sample(range(1 << 19), 100_000))
    extents = array("Q", [page * PAGE for page in pages])
    place = arena.put(extents)
    assert place.length <= len(extents) * extents.itemsize / 8
    assert arena.get(place) == extents
