"""Fixtures for all tests: directories and real file systems to test on."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

from diffmergefs.sidecars import verified
from tests.support import isolation, loopfs, mounttable
from tests.support import soak as soaking
from tests.support.strict_skips import pytest_make_collect_report, pytest_runtest_makereport

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]


settings.register_profile("soak", deadline=None, print_blob=True)

_SOAK_SECONDS = 1800

_TESTS = Path(__file__).parent
_MARKERS = {
    "filesystems": ("root",),
    "mount": ("root", "fuse"),
    "faults": ("root", "fuse", "slow"),
    "packages": ("root", "fuse", "slow"),
    "fuzz": ("slow",),
    "vm": ("root", "fuse", "slow"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """--soak and --soak-report, for `make soak`."""
    parser.addoption(
        "--soak", action="store_true", help="run the fuzzing and fault tests at their full counts"
    )
    parser.addoption(
        "--soak-report", type=Path, metavar="FILE", help="write what the tests saw to FILE"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis runs with the profile of that name too; the session has mounts of its own."""
    isolation.keep_files_on_disk()
    isolation.enter_own_mounts()
    isolation.have_usual_signals()
    if config.getoption("--soak"):
        settings.load_profile("soak")
    if path := config.getoption("--soak-report"):
        config.pluginmanager.register(soaking.Record(path, full=config.getoption("--soak")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Set the markers by folder. The full counts take longer than a test may otherwise."""
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        for name in _MARKERS.get(folder, ()):
            item.add_marker(name)
    if config.getoption("--soak"):
        for item in items:
            item.add_marker(pytest.mark.timeout(_SOAK_SECONDS))


@pytest.fixture(scope="session")
def soak(pytestconfig: pytest.Config) -> bool:
    """Whether the full counts are asked for."""
    return bool(pytestconfig.getoption("--soak"))


@pytest.fixture(scope="session")
def count(soak: bool) -> Callable[[int], int]:
    """``count(200)``: 200 with --soak, and a tenth of it without."""
    return soaking.counter(soak)


@pytest.fixture
def seen(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """``seen(kills=200)``: notes the numbers for the page that `make soak` writes."""
    return soaking.teller(record_property)


@pytest.fixture(scope="session", autouse=True)
def _state_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this process verifies is not remembered in the real state directory."""
    directory = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verified, "ROOTS_DIRECTORY", str(directory))
        patch.setenv("XDG_STATE_HOME", str(directory))
        yield


@contextmanager
def public_directory() -> Iterator[Path]:
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


@pytest.fixture(autouse=True)
def _log_of_its_own() -> Iterator[None]:
    """The log as it is set up: a test of `mount` sends it elsewhere."""
    log = logging.getLogger("diffmergefs")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A fresh directory with mode 755, reachable for every user."""
    with public_directory() as path:
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
    with public_directory() as base, ExitStack() as stack:

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
