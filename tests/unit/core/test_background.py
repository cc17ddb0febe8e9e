"""Files are closed by threads where a close may hang, each filesystem's by one of its own."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmergefs.core import background
from diffmergefs.core.background import close, closing_in_threads, started
from diffmergefs.core.layer import Layer
from tests.support.images import PAGE, write_layer
from tests.support.live import until


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def opened() -> int:
    return os.open("/dev/null", os.O_RDONLY)


class Hung:
    """Stands in for os.close, which does not come back for some descriptors."""

    def __init__(self) -> None:
        self.fds: set[int] = set()
        self.goes_on = threading.Event()
        self._close = os.close

    def __call__(self, fd: int) -> None:
        if fd in self.fds:
            self.goes_on.wait(60)
        self._close(fd)


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hung]:
    found = Hung()
    monkeypatch.setattr(os, "close", found)
    yield found
    found.goes_on.set()


def test_here_unless_asked_for_threads(hung: Hung) -> None:
    fd = opened()
    close(fd, 1)
    assert not is_open(fd)
    close(fd, 1)  # what close(2) says is nobody's concern


def test_one_that_hangs_holds_up_those_of_its_filesystem_alone(hung: Hung) -> None:
    stuck, behind, others = opened(), opened(), [opened() for _ in range(5)]
    hung.fds.add(stuck)
    with closing_in_threads():
        close(stuck, 1)
        close(behind, 1)
        for fd in others:
            close(fd, 2)
        until(lambda: not any(map(is_open, others)), "the others are not closed")
        assert is_open(stuck) and is_open(behind)
        hung.goes_on.set()
        until(lambda: not is_open(behind), "it is not closed once it can be")
    assert background._Closing.queue is None


def test_a_layer_whose_last_reference_drops_waits_for_nothing(hung: Hung, tmp_path: Path) -> None:
    layer = Layer.open(str(write_layer(tmp_path / "layer", 16 * PAGE, [])))
    fd = layer.fd
    hung.fds.add(fd)
    with closing_in_threads():
        del layer
        gc.collect()
        assert is_open(fd)
        hung.goes_on.set()
        until(lambda: not is_open(fd), "it is not closed")


def test_without_threads_it_is_closed_all_the_same(
    hung: Hung, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    first, second = opened(), opened()
    with closing_in_threads():
        monkeypatch.setattr(threading.Thread, "start", start)
        assert started(print, "none") is None
        close(first, 1)
        until(lambda: not is_open(first), "it is not closed")
    with closing_in_threads():
        close(second, 1)
        assert not is_open(second)


def test_a_layer_that_cannot_be_looked_at_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> os.stat_result:
        raise OSError(errno.EIO, "on purpose")

    fd = opened()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fail)
        with pytest.raises(OSError):
            Layer("layer", fd)
    assert not is_open(fd)
