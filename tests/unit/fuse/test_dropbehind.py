"""Which pages of the layers are dropped once a view has served them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.dropbehind import DropBehind, drop
from diffmergefs.opening.images import open_chain
from tests.support.images import overlay_oracle
from tests.support.live import until
from tests.support.subjects.dropbehind import (
    LAYERS,
    MIB,
    SIZE,
    Advised,
    advised,
    cached,
    forget,
    of_mebibytes,
    warm,
    write_layers,
)

__all__ = ["advised"]


def test_a_layer_that_supplied_nothing_keeps_its_pages(tmp_path: Path, advised: Advised) -> None:
    base, diff = write_layers(tmp_path)
    with open_chain(base, [diff]).view as view:
        advised.clear()
        drop(view, MIB, 2 * MIB)
    assert advised == {diff: of_mebibytes(1)}


def test_ranges_are_joined_before_they_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int, int, int]] = []
    base, diff = write_layers(tmp_path)
    with open_chain(base, [diff]).view as view:
        fds = [layer.fd for layer in view.layers]
        monkeypatch.setattr(os, "posix_fadvise", lambda *call: calls.append(call))
        dropping = DropBehind()
        for start, stop in ((50, 70), (0, 10), (10, 30), (60, 65), (70, 80), (MIB, MIB + 5)):
            dropping.served(view, start, stop - start)
        dropping.close()
    expected = [(fds[0], 0, 30), (fds[0], 50, 30), (fds[1], MIB, 5)]
    assert calls == [(*call, os.POSIX_FADV_DONTNEED) for call in expected]


def test_a_file_that_takes_no_advice_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, diff = write_layers(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError("on purpose")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    dropping = DropBehind()
    with open_chain(base, [diff]).view as view:
        dropping.served(view, 0, SIZE)
        dropping.close()
        assert view.read(0, SIZE) == overlay_oracle(SIZE, LAYERS)


def test_a_batch_is_dropped_at_once_and_a_little_after_a_while(tmp_path: Path) -> None:
    base, diff = write_layers(tmp_path)
    dropping = DropBehind()
    with open_chain(base, [diff]).view as view:
        forget(base)
        for start, length in ((8 * MIB, 8 * MIB), (0, MIB)):
            warm(base, *range(start // MIB, (start + length) // MIB))
            dropping.served(view, start, length)
            until(lambda: not cached(base), "the pages stay")
    dropping.close()


def test_it_keeps_no_layer_open_and_ends_when_nothing_was_served(tmp_path: Path) -> None:
    DropBehind().close()
    base, _ = write_layers(tmp_path)
    dropping = DropBehind()
    view = MergedView([Layer.open(str(base))])
    fd = view.layers[0].fd
    dropping.served(view, 0, MIB)
    until(lambda: not dropping._served, "nothing was taken")
    del view
    until(lambda: os.path.exists(f"/proc/self/fd/{fd}") is False, "the layer is held open")
    dropping.close()
