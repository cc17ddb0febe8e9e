"""Fixtures for all tests: directories and real file systems to test on."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import loopfs, mounttable
from tests.support.strict_skips import pytest_make_collect_report, pytest_runtest_makereport

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]


@contextmanager
def _public_directory() -> Iterator[Path]:
    """A fresh directory that every user may enter (pytest's own are for one user).

    Removed afterwards, with whatever was still mounted in it.
    """
    path = Path(os.path.realpath(tempfile.mkdtemp(prefix="diffmergefs-test-")))
    path.chmod(0o755)
    try:
        yield path
    finally:
        mounttable.unmount_below(str(path))
        shutil.rmtree(path)


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A fresh directory with mode 755, reachable for every user."""
    with _public_directory() as path:
        yield path


@pytest.fixture
def mountpoint(public_path: Path) -> Path:
    """An empty directory, reachable for every user, to mount diffmergefs on."""
    path = public_path / "mnt"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture(scope="session")
def filesystem() -> Iterator[Callable[[str], Path]]:
    """``filesystem(kind)``: a fresh directory on a real file system of the kind.

    The kinds are `loopfs.KINDS`. Each file system is made once a session, of
    `loopfs.SIZE` bytes: who writes much there removes it again.
    """
    roots: dict[str, Path] = {}
    numbers = itertools.count()
    with _public_directory() as base, ExitStack() as stack:

        def fresh_directory(kind: str) -> Path:
            if kind not in roots:
                under = base / kind
                under.mkdir(mode=0o755)
                try:
                    roots[kind] = stack.enter_context(loopfs.made(kind, under))
                except BaseException:
                    shutil.rmtree(under)
                    raise
            path = roots[kind] / f"{next(numbers)}"
            path.mkdir(mode=0o755)
            return path

        yield fresh_directory


@pytest.fixture(params=["ext4", "xfs", "btrfs", "tmpfs"])
def real_fs(request: pytest.FixtureRequest, filesystem: Callable[[str], Path]) -> Iterator[Path]:
    """A fresh directory on each of the file systems that snapshots are kept on."""
    path = filesystem(request.param)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def overlay_fs(filesystem: Callable[[str], Path]) -> Iterator[loopfs.Overlay]:
    """A fresh overlay mount, all of whose layers are on ext4."""
    path = filesystem("ext4")
    with loopfs.overlay(path) as layers:
        yield layers
    shutil.rmtree(path)
