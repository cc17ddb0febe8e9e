"""Law 10: how a mount ends, and what is left of it for those who use it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from diffmergefs.system.mounttable import in_other_namespaces, mounts
from tests.support import mounttable
from tests.support.commands import diffmergefs_as_nobody, mistake, one_line
from tests.support.images import PAGE, signed
from tests.support.live import Gate, held, patch_children, until
from tests.support.mounts import CONNECTIONS, Mount, abort, mounted, require_fusectl
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
                line = f"{number.name}: detached; 2 files are open; serving until the last"
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
        assert f"{second.name} again: ending at once, 1 file is open" in mount.log()
        # What the holder has it keeps, the rest is gone: the law's price of a second signal.
        assert holder.read(0, PAGE) == signed(0, 0, PAGE)
        assert holder.read(PAGE, PAGE) == b""
        assert holder.process.wait(60) == -signal.SIGBUS


def test_a_second_signal_does_not_wait_for_a_hung_read(
    store: Path, public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(public_path / "gate")
    code = (
        "from diffmergefs.core.view import MergedView\n"
        "MergedView.fill_nowait = lambda *args: 0\n"
        "MergedView.fill = lambda *args: wait_at_gate()\n"
    )
    gate.patch(monkeypatch, code)
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
        mount.kill()
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


def test_what_lies_in_a_stale_mount_is_named_with_the_remedy(
    store: Path, mountpoint: Path, public_path: Path
) -> None:
    with mounted(store, mountpoint) as mount:
        mount.kill()
        for path in (mountpoint, mountpoint / "leaf", mountpoint / "leaf" / "memory.bin"):
            where = "" if path == mountpoint else f", in the mount on {mountpoint}"
            for verb in ("list", "info", "verify", "seal", "doctor"):
                line = mistake(14, verb, path)
                assert line == (
                    f"diffmergefs: {path}{where}: a stale mount, whose daemon died; remove it with"
                    f" `diffmergefs umount {mountpoint}`, or mount there again\n"
                )
        (public_path / "other").mkdir()
        assert "a stale mount" in mistake(14, "mount", mountpoint, public_path / "other")
        assert umount(mountpoint).returncode == 0


def test_a_mount_of_another_user_is_left_alone(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        for options in ([], ["--lazy"]):
            line = one_line(diffmergefs_as_nobody("umount", *options, mountpoint), 10)
            assert "only root and its owner, uid 0, may unmount it" in line
        assert is_mounted(mountpoint)


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
        step = "`diffmergefs status` lists the mounts"
        assert done.stderr == f"diffmergefs: {path}: not a diffmergefs mount point; {step}\n"
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(mountpoint)], check=True, timeout=60)
    done = umount(mountpoint, *options)
    assert done.returncode == REFUSED
    assert "not a diffmergefs mount point, but a mount of type tmpfs" in done.stderr
    assert is_mounted(mountpoint)


ABORT_EXIT = 23
ABORT_TEXT = "the connection to the kernel was ended from outside"


@pytest.mark.parametrize("how", ["abort", "umount -f", "abort once detached"])
def test_a_connection_that_is_cut_off_is_told_with_the_number_of_open_files(
    how: str, store: Path, mountpoint: Path
) -> None:
    require_fusectl()
    with mounted(store, mountpoint, expect_log=(ABORT_TEXT,)) as mount:
        (entry,) = mounttable.at(str(mountpoint))
        fd = os.open(mountpoint / "leaf" / "memory.bin", os.O_RDONLY)
        try:
            if how == "umount -f":
                done = subprocess.run(["umount", "-f", str(mountpoint)], timeout=60)
                assert done.returncode != 0  # it is busy
            elif how == "abort once detached":
                subprocess.run(["umount", "-l", str(mountpoint)], check=True, timeout=60)
            if how != "umount -f":
                (CONNECTIONS / str(entry.minor) / "abort").write_text("1")
            assert mount.process.wait(60) == ABORT_EXIT
            with pytest.raises(OSError):
                os.pread(fd, PAGE, 10 * PAGE)
        finally:
            with suppress(OSError):
                os.close(fd)
        (line,) = [line for line in mount.log().splitlines() if ABORT_TEXT in line]
        assert " WARNING " in line and f"{mountpoint}: " in line and "; 1 file open: " in line


def test_a_connection_that_is_cut_off_with_nothing_open(store: Path, mountpoint: Path) -> None:
    require_fusectl()
    with mounted(store, mountpoint, expect_log=(ABORT_TEXT,)) as mount:
        abort(str(mountpoint))
        assert mount.process.wait(60) == ABORT_EXIT
        assert "; 0 files open: " in mount.log()


@contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    """The file or directory mounted on another path too."""
    subprocess.run(["mount", "--bind", str(source), str(target)], check=True, timeout=60)
    try:
        yield
    finally:
        if mounttable.at(str(target)):
            mounttable.unmount(str(target))


@pytest.mark.parametrize("what", ["leaf/memory.bin", "leaf", ""])
@pytest.mark.parametrize("options", [(), ("--lazy",)])
def test_umount_names_what_the_daemon_lives_on_for(
    options: tuple[str, ...], what: str, store: Path, public_path: Path, mountpoint: Path
) -> None:
    target = public_path / "target"
    target.touch() if what.endswith(".bin") else target.mkdir()
    with mounted(store, mountpoint) as mount:
        with bound(mountpoint / what, target):
            done = umount(mountpoint, *options)
            assert done.returncode == 0
            assert f"{mountpoint}: unmounted, but it is also mounted on {target}" in done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert is_alive(mount)
        assert mount.process.wait(60) == 0


def test_a_signal_names_the_mounts_that_are_left(
    store: Path, public_path: Path, mountpoint: Path
) -> None:
    target = public_path / "target"
    target.touch()
    with mounted(store, mountpoint) as mount:
        with bound(mountpoint / "leaf" / "memory.bin", target):
            mount.process.send_signal(signal.SIGTERM)
            until(lambda: not is_mounted(mountpoint), "it was not detached")
            assert f"0 files are open and it is also mounted on {target}" in mount.log()
            assert target.read_bytes()[PAGE : 2 * PAGE] == signed(1, PAGE, PAGE)
            assert is_alive(mount)
        assert mount.process.wait(60) == 0


def test_mounts_in_other_namespaces_are_named(
    store: Path, public_path: Path, mountpoint: Path
) -> None:
    with mounted(store, mountpoint) as mount:
        # A namespace of a jailer's, to which an unmount does not spread.
        command = ["unshare", "--mount", "--propagation=private", "cat"]
        jail = subprocess.Popen(command, stdin=subprocess.PIPE)
        try:
            mine = os.readlink("/proc/self/ns/mnt")
            until(lambda: os.readlink(f"/proc/{jail.pid}/ns/mnt") != mine, "no namespace")
            until(
                lambda: Path(f"/proc/{jail.pid}/comm").read_text() == "cat\n", "it is not private"
            )
            done = umount(mountpoint)
            assert done.returncode == 0
            place = f"{mountpoint} (in the namespace of process {jail.pid})"
            assert f"also mounted on {place}" in done.stderr
            mount.process.send_signal(signal.SIGTERM)
            until(lambda: f"still mounted on {place}" in mount.log(), "it is not named")
            assert is_alive(mount)
        finally:
            jail.kill()
            jail.communicate()
        assert mount.process.wait(60) == 0


def test_no_other_filesystem_is_named_for_its_device_number(
    store: Path, public_path: Path, mountpoint: Path
) -> None:
    """That of a mount that is gone is the next one's, in whatever namespace."""
    (public_path / "other").mkdir()
    keep = "mount -t tmpfs theirs $1 && echo && exec cat"
    command = ["unshare", "--mount", "--propagation=private", "sh", "-c", keep, "sh"]
    with subprocess.Popen(
        [*command, str(public_path / "other")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as jail:
        try:
            assert jail.stdout is not None and jail.stdout.readline() == b"\n"
            theirs = mounts(str(jail.pid))
            (device,) = [m.device for m in theirs if m.path == str(public_path / "other")]
            assert in_other_namespaces(device, "theirs") == []
            with mounted(store, mountpoint) as mount:
                done = umount(mountpoint)
                assert (done.returncode, done.stderr) == (0, "")
                assert mount.process.wait(60) == 0
        finally:
            jail.kill()


def test_a_signal_detaches_a_mount_that_was_moved(
    store: Path, public_path: Path, mountpoint: Path
) -> None:
    (public_path / "private").mkdir()
    private = public_path / "private"
    subprocess.run(["mount", "-t", "tmpfs", "private", str(private)], check=True)
    subprocess.run(["mount", "--make-private", str(private)], check=True)
    (private / "mnt").mkdir()
    (private / "to").mkdir()
    with mounted(store, private / "mnt") as mount:
        move = ["mount", "--move", str(private / "mnt"), str(private / "to")]
        subprocess.run(move, check=True, timeout=60)
        with held(private / "to" / "leaf" / "memory.bin") as holder:
            mount.process.send_signal(signal.SIGTERM)
            until(lambda: not is_mounted(private / "to"), "it was not detached")
            assert holder.read(PAGE, PAGE) == signed(1, PAGE, PAGE)
        assert mount.process.wait(60) == 0
        assert "SIGTERM: detached" in mount.log()


@pytest.mark.parametrize("where", ["mountpoint", "above"])
def test_a_covered_mount_is_detached_once_nothing_covers_it(
    where: str, store: Path, public_path: Path, mountpoint: Path
) -> None:
    cover = mountpoint if where == "mountpoint" else public_path
    with mounted(store, mountpoint, expect_log=("SIGTERM: cannot detach",)) as mount:
        subprocess.run(["mount", "-t", "tmpfs", "cover", str(cover)], check=True, timeout=60)
        try:
            mount.process.send_signal(signal.SIGTERM)
            text = f"cannot detach: {mountpoint}: a tmpfs on {cover} covers it"
            until(lambda: text in mount.log(), "it does not say that it is covered")
            assert "SIGTERM: detached" not in mount.log()
            assert is_alive(mount) and is_mounted(mountpoint)
        finally:
            subprocess.run(["umount", str(cover)], check=True, timeout=60)
        assert mount.process.wait(60) == 0
        assert not is_mounted(mountpoint)
