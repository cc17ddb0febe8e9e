"""Whether somebody has a layer open for writing, on each file system."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from diffmergefs.core.layer import Layer
from diffmergefs.opening.writers import Writers, writers
from tests.support.subjects.writers import written
from tests.support.writers import opened_for_writing


def test_nobody_writes(real_fs: Path) -> None:
    with closing(Layer.open(str(written(real_fs)))) as layer:
        assert writers(layer.fd) is Writers.NONE


def test_another_process_has_it_open_for_writing(real_fs: Path) -> None:
    path = written(real_fs)
    with closing(Layer.open(str(path))) as layer:
        with opened_for_writing(path):
            assert writers(layer.fd) is Writers.SOME
        assert writers(layer.fd) is Writers.NONE
