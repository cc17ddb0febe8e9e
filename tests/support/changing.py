"""Tags that come, are replaced and go, beside other clients of a mount, and what they show."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.images import PAGE, write_layer
from tests.support.live import until
from tests.support.pagecache import evict
from tests.support.stores import age, pages, write_tag

_TAG = "passing"
_NUMBERS = range(0, 640, 5)


class Changer:
    """What it did: `cycles` of adding, replacing and removing a tag."""

    def __init__(self, store: Path, mountpoint: Path, parent: str, below: bytes) -> None:
        self._store, self._view = store, mountpoint / _TAG / "memory.bin"
        self._parent, self._below = parent, below
        self._ending = threading.Event()
        self.cycles = 0
        self.failure: BaseException | None = None

    def work(self) -> None:
        try:
            while not self._ending.is_set():
                self._cycle(4 + 2 * (self.cycles % 100))
                self.cycles += 1
        except BaseException as error:  # for the test, which runs in another thread
            self.failure = error

    def end(self) -> None:
        self._ending.set()

    def _cycle(self, layer: int) -> None:
        # The old bytes, and those of the replaced file, are read to the end of the cycle.
        size = len(self._below)
        files: list[int] = []
        try:
            write_tag(self._store, _TAG, self._parent, layer=layer, numbers=_NUMBERS, size=size)
            files += until(lambda: self._opened(layer), "the new tag is not there")
            path = self._store / _TAG / "memory.bin"
            other = write_layer(path.with_suffix(".new"), size, pages(layer + 1, _NUMBERS))
            age(other)
            other.rename(path)
            files += until(lambda: self._opened(layer + 1), "the replaced tag is not there")
            self._compare(files[0], layer)
            shutil.rmtree(self._store / _TAG)
            until(lambda: not self._view.exists(), "the removed tag is still there")
            for number, file in enumerate(files):
                self._compare(file, layer + number)
        finally:
            for file in files:
                os.close(file)

    def _opened(self, layer: int) -> list[int]:
        # A descriptor; none if it is not there, not looked at yet, or another one's.
        try:
            file = os.open(self._view, os.O_RDONLY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EBUSY):
                return []
            raise
        start = _NUMBERS[-1] * PAGE
        if os.pread(file, PAGE, start) != self._expected(layer)[start : start + PAGE]:
            os.close(file)
            return []
        self._compare(file, layer)
        return [file]

    def _compare(self, file: int, layer: int) -> None:
        evict(file)
        expected = self._expected(layer)
        stop = (_NUMBERS[-1] + 1) * PAGE
        for at in (0, len(expected) - stop):
            found = b"".join(os.pread(file, PAGE, n) for n in range(at, at + stop, PAGE))
            assert found == expected[at : at + stop], f"{_TAG}: wrong bytes of layer {layer}"

    def _expected(self, layer: int) -> bytes:
        stop = (_NUMBERS[-1] + 1) * PAGE
        top = bytearray(self._below)
        for start, data in pages(layer, _NUMBERS):
            top[start : start + PAGE] = data
        assert len(top) >= stop
        return bytes(top)


@contextmanager
def changing(store: Path, mountpoint: Path, parent: str, below: Path) -> Iterator[Changer]:
    """A thread that adds, replaces and removes a child of the tag `parent`, which shows `below`.

    It has ended, with all it did found right, when this does.
    """
    changer = Changer(store, mountpoint, parent, below.read_bytes())
    thread = threading.Thread(target=changer.work, daemon=True)
    thread.start()
    try:
        yield changer
    finally:
        changer.end()
        thread.join(120)
    assert not thread.is_alive(), "the changer of tags hangs"
    if changer.failure is not None:
        raise changer.failure
