"""The directory and the writers of the tests of outputs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.writing.output import OutputFile

NAME = ".diffmergefs-0123456789abcdef.tmp"


@pytest.fixture(params=["unnamed", "named"])
def directory(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty directory, on a filesystem with O_TMPFILE and on one without."""
    if request.param == "named":
        without_tmpfile(monkeypatch)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def without_tmpfile(patch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest, **named)

    patch.setattr(os, "open", refusing)


@contextmanager
def writing(path: Path, *inputs: Path, force: bool = False) -> Iterator[OutputFile]:
    known = [path.stat() for path in inputs]
    with OutputFile(os.fspath(path), known, force=force) as file:
        os.pwrite(file.target.fd, path.name.encode(), 0)
        yield file


def write(path: Path, *inputs: Path, force: bool = False) -> None:
    with writing(path, *inputs, force=force) as file:
        file.finish(0o600)
        file.publish()


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))
