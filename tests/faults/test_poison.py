"""What ends every server is refused after three deaths, and all else lives; nothing ever hangs"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import public_directory
from tests.support.bigstore import write_store
from tests.support.live import patch_children
from tests.support.moments import IN_MOUNTS
from tests.support.mounts import mounted
from tests.support.readers import reading
from tests.support.servers import TOOK_OVER, covered, deaths, kill_server

__all__ = ["covered"]

needs_resend = pytest.mark.usefixtures("covered")

READERS = 16
BAD = 40 << 20
CUT_OFF = "and no other can go on"
# A new open or lookup, a read, and a page fault, each of a mount without its server.
ERRORS = {os.strerror(107), os.strerror(103), os.strerror(5), "SIGBUS"}

ENDS = {"exit": "os._exit(3)", "abort": "os.abort()"}
# A read of one page of one image ends the server.
BAD_PAGE = """
    import os
    from diffmergefs.core.view import MergedView
    def deadly(real):
        def fill(self, buffer, offset, *rest):
            if offset <= {bad} < offset + len(buffer) and "leaf" in self.layers[-1].path:
                {end}
            return real(self, buffer, offset, *rest)
        return fill
    MergedView.fill = deadly(MergedView.fill)
    MergedView.fill_nowait = deadly(MergedView.fill_nowait)
"""
# And so does the first merge of one chain.
BAD_MERGE = """
    import os
    from diffmergefs.core import view
    real = view._merged
    def merged(layers):
        if "leaf" in layers[-1].path:
            {end}
        return real(layers)
    view._merged = merged
"""
ALWAYS = {
    "at its start": """
    import os
    from diffmergefs.fuse.handover import Handover
    real = Handover.begin
    def begin(self, line, *rest):
        if line.number > 1:
            os._exit(3)
        real(self, line, *rest)
    Handover.begin = begin
""",
    "at any read": """
    import os
    from diffmergefs.core.view import MergedView
    MergedView.fill_nowait = lambda *rest: os._exit(3)
""",
}
# Reads one page with no readahead, and says what became of it.
READ_PAGE = """
import os, sys
try:
    fd = os.open(sys.argv[1], os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    sys.stdout.buffer.write(os.pread(fd, 4096, int(sys.argv[2])))
except OSError as error:
    sys.exit(error.errno)
"""


class Files(NamedTuple):
    """A store, which no test changes, and what each of its views must be equal to."""

    store: Path
    oracles: list[tuple[str, Path]]

    def pairs(self, mountpoint: Path) -> list[tuple[Path, Path]]:
        return [(mountpoint / name, oracle) for name, oracle in self.oracles]


@pytest.fixture(scope="module")
def files() -> Iterator[Files]:
    with public_directory() as folder:
        yield Files(*write_store(folder))


def read_page(view: Path, start: int) -> tuple[int, bytes]:
    """The errno of a process that reads this page, and the bytes."""
    command = [sys.executable, "-c", READ_PAGE, str(view), str(start)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    return done.returncode, done.stdout


@needs_resend
@pytest.mark.parametrize("end", ENDS)
def test_one_bad_page(
    end: str,
    files: Files,
    public_path: Path,
    mountpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen: Callable[..., None],
) -> None:
    """16 readers of other images notice nothing; other reads of this image go on too"""
    pairs = files.pairs(mountpoint)
    view, expected = pairs[-1][0], pairs[-1][1].read_bytes()
    with monkeypatch.context() as patch:
        code = IN_MOUNTS + BAD_PAGE.format(bad=BAD, end=ENDS[end])
        patch_children(patch, public_path / "site", code)
        log = (TOOK_OVER, "ended three servers", "what the last server did")
        with mounted(files.store, mountpoint, expect_log=log) as mount:
            patch.undo()
            with reading(READERS, pairs[:2], walkers=4) as load:
                assert read_page(view, BAD) == (5, b"")
                assert read_page(view, BAD) == (5, b"")
                for start in range(0, 32 << 20, 1 << 20):
                    assert read_page(view, start) == (0, expected[start : start + 4096])
                assert load.end()[2] == Counter(well=READERS + 4)
            assert deaths(mount) == 3
    seen(deaths=3, longest_stall_ms=load.longest_ms)


@needs_resend
@pytest.mark.parametrize("end", ENDS)
def test_one_bad_merge(
    end: str, files: Files, public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tag has no memory file, and readers of the others notice nothing"""
    pairs = files.pairs(mountpoint)
    with monkeypatch.context() as patch:
        code = IN_MOUNTS + BAD_MERGE.format(end=ENDS[end])
        patch_children(patch, public_path / "site", code)
        log = (TOOK_OVER, "ended three servers", "what the last server did")
        with mounted(files.store, mountpoint, expect_log=log) as mount:
            patch.undo()
            with reading(READERS, pairs[:2], walkers=4) as load:
                assert read_page(pairs[-1][0], 0)[0] != 0
                assert load.end()[2] == Counter(well=READERS + 4)
            assert deaths(mount) == 3
            for view, oracle in pairs[:2]:
                assert view.read_bytes() == oracle.read_bytes()


@needs_resend
@pytest.mark.parametrize("when", ALWAYS)
def test_servers_that_always_die_end_the_mount(
    when: str, files: Files, public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All readers get an error, and the log has one line that says why"""
    pairs = files.pairs(mountpoint)
    with monkeypatch.context() as patch:
        patch_children(patch, public_path / "site", IN_MOUNTS + ALWAYS[when])
        log = (TOOK_OVER, "ended three servers", CUT_OFF)
        with mounted(files.store, mountpoint, expect_log=log) as mount:
            patch.undo()
            if when == "at its start":
                with reading(READERS, pairs) as load:
                    kill_server(mount)
                    ends = load.outcome()[2]
                assert set(ends) <= ERRORS and ends.total() == READERS
            else:
                # Each read is another one, so that nothing is refused in time.
                for start in range(0, 60 << 20, 1 << 20):
                    assert read_page(pairs[-1][0], start) in [(n, b"") for n in (5, 103, 107)]
            assert mount.process.wait(60) == 23
            assert mount.log().count(CUT_OFF) == 1


# Kernels before 6.9

NO_RESEND = """
    from diffmergefs.fuse.device import Device
    Device.resends = property(lambda self: False)
"""


def test_a_kernel_that_resends_nothing(
    files: Files,
    public_path: Path,
    mountpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: Callable[[int], int],
    seen: Callable[..., None],
) -> None:
    """After a kill all readers get an error within a second, and nothing hangs"""
    pairs = files.pairs(mountpoint)
    patch_children(monkeypatch, public_path / "site", IN_MOUNTS + NO_RESEND)
    kills, longest = count(100), 0.0
    for number in range(kills):
        with mounted(files.store, mountpoint, expect_log=(CUT_OFF,)) as mount:
            with reading(READERS, pairs, walkers=2) as load:
                time.sleep(number % 10 / 50)
                began = time.monotonic()
                kill_server(mount)
                ends = load.outcome()[2]
                longest = max(longest, time.monotonic() - began)
            assert set(ends) <= ERRORS and ends.total() == READERS + 2
            assert mount.process.wait(60) == 23
            assert mount.log().count(CUT_OFF) == 1
    # Reaping the processes counts too, on a machine that does other things.
    assert longest < 10
    seen(kills=kills, longest_until_all_had_an_error_ms=round(1000 * longest))


@needs_resend
def test_it_is_ended_as_usual_there(
    files: Files, public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_children(monkeypatch, public_path / "site", IN_MOUNTS + NO_RESEND)
    with mounted(files.store, mountpoint) as mount:
        assert (mountpoint / files.oracles[0][0]).read_bytes() == files.oracles[0][1].read_bytes()
        mount.process.send_signal(signal.SIGTERM)
        assert mount.process.wait(60) == 0
