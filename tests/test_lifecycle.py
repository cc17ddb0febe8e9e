"""Law 10: how a mount ends, and what is left of it for those who use it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import mounttable
from tests.support.images import PAGE, signed
from tests.support.live import Gate, held, patch_children, until
from tests.support.mounts import Mount, mounted
from tests.support.stores import write_chain

BUSY = 15
REFUSED = 10


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


def umount(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffmergefs", "umount", *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def is_mounted(path: Path) -> bool:
    return bool(mounttable.at(str(path)))


def is_alive(mount: Mount) -> bool:
    return mount.process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_detaches_and_the_mapping_is_served_on(
    number: signal.Signals, store: Path, mountpoint: Path
) -> None:
    with mounted(store, mountpoint) as mount:
        with held(mountpoint / "leaf" / "memory.bin") as holder:
            other = (mountpoint / "leaf" / "vmstate").open("rb", buffering=0)
            with other:
                assert holder.read(0, PAGE) == signed(0, 0, PAGE)
                mount.process.send_signal(number)
                until(lambda: not is_mounted(mountpoint), "it was not detached")
                assert os.listdir(mountpoint) == []
                line = f"{number.name}: detached; 2 files are open, serving on until the last"
                assert line in mount.log()
                assert holder.read(PAGE, PAGE) == signed(1, PAGE, PAGE)
                assert other.read() == b"state of leaf"
            assert holder.read(2 * PAGE, PAGE) == signed(0, 2 * PAGE, PAGE)
            assert is_alive(mount)
        assert mount.process.wait(60) == 0


def test_with_nothing_open_a_signal_ends_it(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint) as mount:
        mount.process.send_signal(signal.SIGTERM)
        assert mount.process.wait(60) == 0
        assert "SIGTERM: detached; 0 files are open" in mount.log()
        assert not is_mounted(mountpoint)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(
    second: signal.Signals, store: Path, mountpoint: Path
) -> None:
    with mounted(store, mountpoint) as mount, held(mountpoint / "leaf" / "memory.bin") as holder:
        assert holder.read(0, PAGE) == signed(0, 0, PAGE)
        mount.process.send_signal(signal.SIGTERM)
        until(lambda: not is_mounted(mountpoint), "it was not detached")
        mount.process.send_signal(second)
        assert mount.process.wait(60) == 0
        assert f"{second.name} again: ending at once, 1 files open" in mount.log()
        # What the holder has it keeps, the rest is gone: the law's price of a second signal.
        assert holder.read(0, PAGE) == signed(0, 0, PAGE)
        assert holder.read(PAGE, PAGE) == b""
        assert holder.process.wait(60) == -signal.SIGBUS


def test_a_second_signal_does_not_wait_for_a_hung_read(
    store: Path, public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(public_path / "gate")
    code = gate.code + (
        "from diffmergefs.view import MergedView\n"
        "MergedView.fill_nowait = lambda *args: 0\n"
        "MergedView.fill = lambda *args: wait_at_gate()\n"
    )
    patch_children(monkeypatch, public_path / "patch", code)
    with mounted(store, mountpoint) as mount:
        command = ["cat", str(mountpoint / "leaf" / "memory.bin")]
        reader = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            gate.wait_until_reached()
            mount.process.send_signal(signal.SIGTERM)
            until(lambda: not is_mounted(mountpoint), "it was not detached")
            assert is_alive(mount)
            mount.process.send_signal(signal.SIGTERM)
            assert mount.process.wait(60) == 0
            _, text = reader.communicate(timeout=60)
            assert reader.returncode == 1 and text
        finally:
            gate.open()
            reader.kill()
            reader.communicate()


def test_a_new_daemon_takes_the_place_of_one_that_serves_on(store: Path, mountpoint: Path) -> None:
    """As a restarted service does: old mappings are the old daemon's, new ones the new one's."""
    with mounted(store, mountpoint) as old, held(mountpoint / "leaf" / "memory.bin") as holder:
        old.process.send_signal(signal.SIGTERM)
        until(lambda: not is_mounted(mountpoint), "it was not detached")
        with mounted(store, mountpoint):
            assert holder.read(PAGE, PAGE) == signed(1, PAGE, PAGE)
            holder.end()
            assert old.process.wait(60) == 0
            assert is_mounted(mountpoint)
            image = (mountpoint / "leaf" / "memory.bin").read_bytes()
            assert image[PAGE : 2 * PAGE] == signed(1, PAGE, PAGE)


def test_a_killed_daemons_mount_is_cleaned_up(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint) as mount:
        mount.process.kill()
        mount.process.wait(60)
        assert is_mounted(mountpoint)
        link = mountpoint.with_name("link")
        link.symlink_to(mountpoint)
        command = [sys.executable, "-m", "diffmergefs", "mount", str(store), str(link)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0
        assert f"{link}: a stale mount of a daemon that died; unmounted" in done.stderr
        assert len(mounttable.at(str(mountpoint))) == 1
        assert sorted(os.listdir(mountpoint)) == ["base", "leaf"]
        assert umount(mountpoint).returncode == 0
    assert not is_mounted(mountpoint)


OTHER_FUSE = """
import pyfuse3, sys, trio
pyfuse3.init(pyfuse3.Operations(), sys.argv[1], {"fsname=other", "subtype=otherfs"})
print("up", flush=True)
trio.run(pyfuse3.main)
"""


def test_a_stale_mount_of_another_type_is_left_alone(store: Path, mountpoint: Path) -> None:
    command = [sys.executable, "-c", OTHER_FUSE, str(mountpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == b"up\n"
        finally:
            other.kill()
    try:
        command = [sys.executable, "-m", "diffmergefs", "mount", "-f", str(store), str(mountpoint)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == REFUSED
        assert "a stale mount of type fuse.otherfs; unmount it first" in done.stderr
        assert umount(mountpoint).returncode == REFUSED
        assert is_mounted(mountpoint)
    finally:
        mounttable.unmount(str(mountpoint))


def test_an_unmount_from_outside_ends_the_daemon(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint) as mount:
        subprocess.run(["umount", str(mountpoint)], check=True, timeout=60)
        assert mount.process.wait(60) == 0
        assert "SIGTERM" not in mount.log()


def test_a_lazy_unmount_from_outside_ends_it_after_the_last_user(
    store: Path, mountpoint: Path
) -> None:
    with mounted(store, mountpoint) as mount:
        with held(mountpoint / "leaf" / "memory.bin") as holder:
            subprocess.run(["umount", "-l", str(mountpoint)], check=True, timeout=60)
            assert holder.read(PAGE, PAGE) == signed(1, PAGE, PAGE)
            assert is_alive(mount)
        assert mount.process.wait(60) == 0


ABORTED = """
import errno, os, sys
if "mount" in sys.argv:
    import pyfuse3
    main = pyfuse3.main
    async def aborted(*args, **kwargs):
        await main(*args, **kwargs)
        error = ConnectionAbortedError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))
        raise ExceptionGroup("as trio has it", [ExceptionGroup("", [error])])
    pyfuse3.main = aborted
"""


@pytest.mark.parametrize("how", ["outside", "SIGTERM"])
def test_a_mount_that_goes_while_a_request_is_read_ends_like_any_other(
    store: Path,
    mountpoint: Path,
    public_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """The kernel then says ECONNABORTED, which was met once in thousands of ends."""
    patch_children(monkeypatch, public_path / "patch", ABORTED)
    with mounted(store, mountpoint, "--verbose") as mount:
        if how == "outside":
            subprocess.run(["umount", str(mountpoint)], check=True, timeout=60)
        else:
            mount.process.send_signal(signal.SIGTERM)
        assert mount.process.wait(60) == 0
        assert "the connection ended while a request was read" in mount.log()


def test_umount_refuses_while_files_are_open(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint) as mount:
        with held(mountpoint / "leaf" / "memory.bin") as holder:
            done = umount(mountpoint)
            assert done.returncode == BUSY
            assert f"{mountpoint}: files of it are open" in done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert is_mounted(mountpoint) and is_alive(mount)
            assert umount(mountpoint, "--lazy").returncode == 0
            assert not is_mounted(mountpoint)
            assert holder.read(PAGE, PAGE) == signed(1, PAGE, PAGE)
            assert is_alive(mount)
        assert mount.process.wait(60) == 0


@pytest.mark.parametrize("how", ["plain", "relative", "symlink"])
def test_umount_ends_it(how: str, store: Path, mountpoint: Path) -> None:
    link = mountpoint.with_name("link")
    link.symlink_to("mnt")
    path = {"plain": mountpoint, "relative": Path("mnt/"), "symlink": link}[how]
    with mounted(store, mountpoint) as mount:
        command = [sys.executable, "-m", "diffmergefs", "umount", str(path)]
        subprocess.run(command, check=True, timeout=60, cwd=mountpoint.parent)
        assert not is_mounted(mountpoint)
        assert mount.process.wait(60) == 0


@pytest.mark.parametrize("options", [(), ("--lazy",)])
def test_umount_refuses_what_is_no_mount_of_ours(
    options: tuple[str, ...], public_path: Path, mountpoint: Path
) -> None:
    for path in (mountpoint, public_path / "missing"):
        done = umount(path, *options)
        assert done.returncode == REFUSED
        assert done.stderr == (
            f"diffmergefs: {path}: no diffmergefs mount, nothing is mounted there\n"
        )
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(mountpoint)], check=True, timeout=60)
    done = umount(mountpoint, *options)
    assert done.returncode == REFUSED
    assert "no diffmergefs mount, a tmpfs is mounted there" in done.stderr
    assert is_mounted(mountpoint)
