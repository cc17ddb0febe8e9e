"""A mount whose daemon hangs takes no command with it, and can be taken away."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from diffmergefs.system.mounttable import mount_entry, mount_over, resolved
from tests.support import mounttable
from tests.support.commands import diffmergefs, diffmergefs_as_nobody, one_line
from tests.support.live import Gate, held
from tests.support.mounts import Mount, mounted
from tests.support.stores import write_chain

REFUSED, TIMEOUT = 10, 12


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


@contextmanager
def hung(store: Path, mountpoint: Path, *options: str) -> Iterator[Mount]:
    """A mount whose daemon is stopped, and goes on at the end."""
    with mounted(store, mountpoint, *options) as mount:
        with mount.stopped():
            yield mount
        if not mounttable.at(str(mountpoint)):
            mount.process.wait(60)


@pytest.mark.parametrize("options", [(), ("--lazy",)])
@pytest.mark.parametrize("how", ["plain", "inside", "link"])
def test_it_is_unmounted(options: tuple[str, ...], how: str, store: Path, mountpoint: Path) -> None:
    (mountpoint.parent / "link").symlink_to("mnt")
    with hung(store, mountpoint):
        if how == "inside":
            # Whatever is mounted there is not asked what lies in it.
            for path in (
                mountpoint / "leaf",
                mountpoint / "no" / "such",
                mountpoint / ".." / "mnt/x",
            ):
                text = one_line(diffmergefs("umount", *options, path), REFUSED)
                assert (
                    f"{path}: is no mountpoint itself, but lies in the mount on {mountpoint};"
                    in text
                )
            text = one_line(diffmergefs("umount", *options, store), REFUSED)
            assert f"{store}: is no mountpoint itself, but is mounted on {mountpoint};" in text
            return
        path = mountpoint if how == "plain" else mountpoint.parent / "link"
        done = diffmergefs("umount", *options, path)
        assert (done.returncode, done.stderr) == (0, "")
        assert not mounttable.at(str(mountpoint))


def test_lazily_also_while_files_are_open(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint) as mount:
        with held(mountpoint / "leaf" / "memory.bin"), mount.stopped():
            assert "files of it are open by" in one_line(diffmergefs("umount", mountpoint), 15)
            assert diffmergefs("umount", "--lazy", mountpoint).returncode == 0
            assert not mounttable.at(str(mountpoint))
        assert mount.process.wait(60) == 0


def all_at_once(
    *runs: Callable[[], subprocess.CompletedProcess[str]],
) -> list[subprocess.CompletedProcess[str]]:
    """What these commands did. Each of them waits for some seconds."""
    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(lambda run: run(), runs))


def test_status_gives_up(store: Path, mountpoint: Path) -> None:
    with hung(store, mountpoint):
        options = (), ("--json",), ("--metrics",), ("--watch",)
        ended = all_at_once(
            *(partial(diffmergefs, "status", *each, mountpoint) for each in options)
        )
        for done in ended:
            text = one_line(done, TIMEOUT)
            assert f"{mountpoint}: the daemon has not answered for 5 s" in text
            assert f"umount --lazy {mountpoint}" in text


def test_a_second_mount_there_is_refused(store: Path, mountpoint: Path) -> None:
    with hung(store, mountpoint):
        runs = [
            partial(diffmergefs, "mount", "--log", "/dev/null", *options, store, path)
            for options in ((), ("-f",))
            for path in (mountpoint, mountpoint / "leaf")
        ]
        ended = all_at_once(*runs)
        for done, inside in (ended[:2], ended[2:]):
            assert done.returncode == REFUSED
            line = f"diffmergefs: {mountpoint}: {store} is mounted there already, and its server"
            assert done.stderr.splitlines()[-1].startswith(f"{line} does")
            assert inside.returncode == TIMEOUT and "umount --lazy" in inside.stderr


# What a user may name in a mount; S is the store, M the mountpoint.
COMMANDS = {
    "list": "list M",
    "info": "info M/leaf",
    "info by link": "info S/../link/leaf",
    "flatten": "flatten M/leaf -o S/../out",
    "flatten into it": "flatten S/leaf -o M/out",
    "layers": "info --base M/base/memory.bin --diff S/leaf/memory.bin",
    "state": "verify S/leaf --state-dir M/state",
    "outside": "list S --allow-outside M",
    "compare": "compare S/leaf M/leaf",
    "doctor": "doctor M/leaf/memory.bin",
    "seal": "seal M/leaf/memory.bin",
    "apply": "apply M/leaf/memory.bin S/../copy",
    "source": "mount M S/../other",
    "log": "mount --log M/log S S/../other",
    "option": "mount -o base=M/base/memory.bin S/../other",
    "below another": "mount -o state_dir=M/x S S/../other",
}


def test_a_path_in_it_is_one_line(store: Path, mountpoint: Path) -> None:
    (mountpoint.parent / "link").symlink_to("mnt")
    (mountpoint.parent / "other").mkdir()
    names = {"M": str(mountpoint), "S": str(store)}
    commands = [re.sub("[MS]", lambda m: names[m[0]], text) for text in COMMANDS.values()]
    with hung(store, mountpoint):
        for done in all_at_once(*(partial(diffmergefs, *each.split()) for each in commands)):
            text = one_line(done, TIMEOUT)
            assert f" in the mount on {mountpoint}: " in text or f" {mountpoint}: the dae" in text


def test_an_ordinary_user_hangs_as_little(store: Path, mountpoint: Path) -> None:
    with hung(store, mountpoint, "--allow-other"):
        assert "has not answered" in one_line(diffmergefs_as_nobody("status", mountpoint), TIMEOUT)
        assert "has not answered" in one_line(diffmergefs_as_nobody("list", mountpoint), TIMEOUT)


def test_a_daemon_that_hangs_over_the_very_request_is_left_alone_too(
    store: Path, public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for an answer to what was read already cannot be killed before it comes."""
    gate = Gate(public_path / "gate")
    code = (
        "import sys\n"
        "if '-f' in sys.argv:\n"
        "    import pyfuse3\n"
        "    from diffmergefs.fuse.operations import Operations\n"
        "    async def hangs(*args):\n"
        "        wait_at_gate()\n"
        "        raise pyfuse3.FUSEError(5)\n"
        "    Operations.statfs = hangs\n"
    )
    gate.patch(monkeypatch, code)
    with mounted(store, mountpoint):
        try:
            command = [sys.executable, "-m", "diffmergefs", "list", str(mountpoint)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == TIMEOUT and "has not answered" in done.stderr
        finally:
            gate.open()


def test_paths_are_judged_by_the_table_of_mounts(store: Path, mountpoint: Path) -> None:
    folder = mountpoint.parent
    (folder / "link").symlink_to("mnt")
    (folder / "far").symlink_to(f"{folder}/link/leaf/../base")
    (folder / "loop").symlink_to("loop")
    with hung(store, mountpoint):
        real = str(mountpoint)
        assert resolved(f"{folder}/link") == real
        assert resolved(f"{folder}/mnt/leaf/none/..//./x") == f"{real}/leaf/x"
        assert resolved(str(folder / "far")) == f"{real}/base"
        assert resolved(f"{folder}/far/../..") == str(folder)
        assert resolved(f"{folder}/loop") == f"{folder}/loop"
        over = mount_over(f"{real}/leaf/x")
        assert over is not None and over == mount_entry(real) and over.kind == "fuse.diffmergefs"
        assert mount_entry(f"{real}/leaf") is None
        other = mount_over(f"{real}-beside")
        assert other is not None and other.path != real


def test_a_covered_mount_is_not_the_one_that_paths_lead_to(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        for point in (mountpoint, mountpoint.parent):
            subprocess.run(["mount", "-t", "tmpfs", "cover", str(point)], check=True)
            try:
                known = mount_over(str(mountpoint))
                assert known is not None and (known.path, known.source) == (str(point), "cover")
                done = diffmergefs("umount", mountpoint)
                assert done.returncode == REFUSED
            finally:
                subprocess.run(["umount", str(point)], check=True)
        known = mount_entry(str(mountpoint))
        assert known is not None and known.source == str(store)
