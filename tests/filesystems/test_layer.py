"""Reads of a layer that depend on its file system."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.errors import LayerChangedError
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from tests.support.images import PAGE, signed
from tests.support.layers import SIZE, written


def test_an_early_end_of_the_file_is_an_error_and_never_a_short_read(real_fs: Path) -> None:
    path = written(real_fs)
    layer = Layer.open(str(path))
    os.truncate(path, 2 * PAGE + 100)
    with pytest.raises(LayerChangedError, match=f"ends before byte {3 * PAGE}, it had {SIZE}"):
        layer.read_into(memoryview(bytearray(PAGE)), 2 * PAGE)


def test_tmpfs_is_read_at_once_though_it_refuses_nowait(filesystem: Callable[[str], Path]) -> None:
    view = MergedView([Layer.open(str(written(filesystem("tmpfs"))))])
    assert bytes(view.read_nowait(2 * PAGE, PAGE) or b"") == signed(1, 2 * PAGE, PAGE)
