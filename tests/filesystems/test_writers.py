"""Whether somebody has a layer open for writing, on each file system."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from diffmergefs.core.layer import Layer
from diffmergefs.opening.writers import Writers, writers
from tests.support import skips
from tests.support.subjects.writers import fd, path, written
from tests.support.users import NOBODY
from tests.support.writers import opened_for_writing

__all__ = ["fd", "path"]


def test_nobody_writes(real_fs: Path) -> None:
    with closing(Layer.open(str(written(real_fs)))) as layer:
        assert writers(layer.fd) is Writers.NONE


def test_another_process_has_it_open_for_writing(real_fs: Path) -> None:
    path = written(real_fs)
    with closing(Layer.open(str(path))) as layer:
        with opened_for_writing(path):
            assert writers(layer.fd) is Writers.SOME
        assert writers(layer.fd) is Writers.NONE


def as_nobody(ask: Callable[[], str]) -> str:
    """What `ask` gives in a child of this process that has become the user nobody."""
    skips.require_root()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(write_end, ask().encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as answer:
        text = answer.read()
    assert os.waitpid(child, 0) == (child, 0)
    return text


def test_somebody_elses_file_cannot_be_asked_about(public_path: Path) -> None:
    path = written(public_path)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert as_nobody(lambda: writers(fd).name) == "NOT_OWNER"
        os.chown(path, NOBODY, NOBODY)
        assert as_nobody(lambda: writers(fd).name) == "NONE"
        with opened_for_writing(path):
            assert as_nobody(lambda: writers(fd).name) == "SOME"
    finally:
        os.close(fd)
