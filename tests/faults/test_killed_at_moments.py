"""Servers die at the worst moments, ten times at each, under load: no client gets an error"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import public_directory
from tests.support.bigstore import write_store
from tests.support.images import overlay_oracle
from tests.support.live import until
from tests.support.moments import Moments
from tests.support.mounts import Mount, mounted
from tests.support.readers import reading
from tests.support.servers import TOOK_OVER, covered, kill_server, takeovers, wait_for_takeovers
from tests.support.stores import BASE_PAGES, SIZE, pages, write_tag

__all__ = ["covered"]

pytestmark = pytest.mark.usefixtures("covered")

READERS, TIMES = 16, 10
#: With such long names, a listing takes several requests.
TAGS, LONG = 180, "-" * 56
_SECONDS = 60
# Sixty deaths within five seconds end the mount.
_PAUSE_SECONDS = 0.05

_OPERATIONS = "diffmergefs.fuse.operations:Operations"
_HANDOVER = "diffmergefs.fuse.handover:Handover"
#: At the first use of a tag: from its look-up to the answer.
OPENING = {
    "lookup": f"before {_OPERATIONS}.lookup",
    "first walk": "before diffmergefs.core.sparse:walk",
    "merge": "before diffmergefs.core.view:_merged",
    "merged": "after diffmergefs.core.view:_merged",
    "kept": f"after {_HANDOVER}.keep",
    "number": f"before {_HANDOVER}._looked_up",
    "looked up": f"after {_OPERATIONS}.lookup",
}
#: At each use.
USING = {
    "open": f"before {_OPERATIONS}.open",
    "opened": f"after {_OPERATIONS}.open",
    "getattr": f"before {_OPERATIONS}.getattr",
    "getxattr": f"after {_OPERATIONS}.getxattr",
    "read": "before diffmergefs.core.view:MergedView.fill_nowait",
    "close": f"before {_OPERATIONS}.release",
    "closed": f"after {_OPERATIONS}.release",
}
LISTING = {
    "opendir": f"after {_OPERATIONS}.opendir",
    "readdir": f"before {_OPERATIONS}.readdir",
    "listed": f"after {_OPERATIONS}.readdir",
}
ALONE = {
    "forget": f"before {_OPERATIONS}.forget",
    "forgotten": f"after {_OPERATIONS}.forget",
    "look": "before diffmergefs.fuse.served:Store.look",
    "look saved": f"after {_HANDOVER}._saved",
    "journal": "before diffmergefs.fuse.journal:Journal._write",
}
TAKEOVER = {
    "INIT": "before diffmergefs.fuse.device:Introduction.finish",
    "takeover": f"before {_HANDOVER}.begin",
    "new journal": "after diffmergefs.fuse.journal:Journal.begin",
    "ready": "before diffmergefs.fuse.session:Session._become_ready",
}


class Load:
    """A mount with readers on it, fresh tags, and moments for its servers to die at."""

    def __init__(
        self, mount: Mount, moments: Moments, store: Path, mountpoint: Path, folder: Path
    ) -> None:
        self.mount, self.moments = mount, moments
        self.store, self.mountpoint = store, mountpoint
        self._folder = folder
        self._fresh = iter(sorted(path.name for path in store.glob("fresh*")))

    def fresh(self) -> str:
        """A tag that nobody has used yet."""
        return next(self._fresh)

    def require_right(self, tag: str, *, ask: bool = False) -> None:
        """Look the tag up, and compare its bytes; `ask` for its attributes too."""
        number = int(tag.removesuffix(LONG).removeprefix("fresh"))
        oracle = self._folder / "oracle"
        oracle.write_bytes(overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [number % 16])]))
        view = self.mountpoint / tag / "memory.bin"
        run("cmp", view, oracle)
        if ask:
            assert run("stat", "--cached=never", "--format=%s", view) == f"{SIZE}\n"
            assert run("getfattr", "--only-values", "-n", "user.diffmergefs.layers", view) == "2"

    def require_listing(self) -> None:
        """List the mount: every tag once."""
        names = run("ls", "-f", self.mountpoint).split()
        tags = [path.name for path in self.store.iterdir()]
        assert len(names) == len(tags) and not set(tags).symmetric_difference(names)

    def dies(self, name: str, use: Callable[[], None], **how: int) -> None:
        """Have the server die at this moment of `use`, which must not notice."""
        before = takeovers(self.mount)
        self.moments.arm(name, **how)
        use()
        self.moments.wait(name)
        wait_for_takeovers(self.mount, before + 1)
        time.sleep(_PAUSE_SECONDS)


def run(*command: object) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=_SECONDS
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    """One for all tests. It fails at their end if a reader got an error."""
    with public_directory() as folder, pytest.MonkeyPatch.context() as patch:
        store, oracles = write_store(folder)
        write_tag(store, "bottom")
        for number in range(TAGS):
            write_tag(store, f"fresh{number:03}{LONG}", "bottom", layer=1, numbers=[number % 16])
        mountpoint = folder / "mnt"
        mountpoint.mkdir()
        moments = Moments(folder / "moments", OPENING | USING | LISTING | ALONE | TAKEOVER)
        moments.patch(patch)
        pairs = [(mountpoint / name, oracle) for name, oracle in oracles]
        with mounted(store, mountpoint, expect_log=(TOOK_OVER,)) as mount:
            patch.undo()
            with reading(READERS, pairs) as readers:
                yield Load(mount, moments, store, mountpoint, folder)
                assert readers.end()[2] == Counter(well=READERS)


@pytest.mark.timeout(300)
def test_while_a_tag_is_used_for_the_first_time(load: Load, seen: Callable[..., None]) -> None:
    """Looked up, walked, merged and made known to a successor"""
    for name in OPENING:
        for _ in range(TIMES):
            tag = load.fresh()
            load.dies(name, partial(load.require_right, tag))
            load.require_right(tag)
    seen(moments=len(OPENING), kills=len(OPENING) * TIMES)


@pytest.mark.timeout(300)
def test_while_a_tag_is_used(load: Load, seen: Callable[..., None]) -> None:
    """Opened, read, asked for attributes, and closed"""
    tag = load.fresh()
    load.require_right(tag)
    for name in USING:
        for _ in range(TIMES):
            load.dies(name, lambda: load.require_right(tag, ask=True))
    seen(moments=len(USING), kills=len(USING) * TIMES)


@pytest.mark.timeout(300)
def test_while_a_large_directory_is_listed(load: Load, seen: Callable[..., None]) -> None:
    """Each listing has every name once, whichever of its requests the server dies of"""
    load.require_listing()
    for name in LISTING:
        for number in range(TIMES):
            skip = number % 2 if name != "opendir" else 0
            load.dies(name, load.require_listing, skip=skip)
    seen(moments=len(LISTING), kills=len(LISTING) * TIMES)


@pytest.mark.timeout(300)
def test_while_the_kernel_forgets_and_the_source_is_looked_over(
    load: Load, seen: Callable[..., None]
) -> None:
    """FORGET after drop_caches, a look at SOURCE with and without news, a write to the journal"""
    tag = load.fresh()
    for number in range(TIMES):
        for name in ("forget", "forgotten"):
            load.require_right(tag)
            load.dies(name, drop_caches)
            load.require_right(tag)
        load.dies("look", lambda: None)
        passing = write_tag(load.store, "passing", "bottom", layer=1, numbers=[number])
        load.dies("look saved", lambda: None)
        until((load.mountpoint / "passing").exists, "the new tag is not shown")
        shutil.rmtree(passing)
        load.dies("journal", lambda: load.require_right(tag))
        load.require_right(tag)
    seen(moments=len(ALONE), kills=len(ALONE) * TIMES)


def drop_caches() -> None:
    run("sh", "-c", "echo 2 >/proc/sys/vm/drop_caches")


@pytest.mark.timeout(300)
def test_while_a_server_takes_over(load: Load, seen: Callable[..., None]) -> None:
    """Ten servers in a row die at one moment of their start"""
    tag = load.fresh()
    load.require_right(tag)
    for name in TAKEOVER:
        load.dies(name, lambda: kill_once(load.mount), deaths=TIMES)
        load.require_right(tag)
    seen(moments=len(TAKEOVER), kills=len(TAKEOVER) * (TIMES + 1))


def kill_once(mount: Mount) -> None:
    kill_server(mount)
