"""The systemd unit in docs/: what systemd says of it, and what a real systemd does with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmergefs.fuse.service import Service
from diffmergefs.fuse.status import STATUS_FILE, Status
from tests.support import skips
from tests.support.images import PAGE, signed
from tests.support.live import held, until
from tests.support.namespaces import Namespace
from tests.support.places import DOCS
from tests.support.stores import write_chain
from tests.support.usermanager import Manager, user_manager

UNIT = DOCS / "diffmergefs@.service"
PROGRAM = "/usr/local/bin/diffmergefs"
#: What a mount unit is after a lazy umount by hand, when a stop has failed before: with systemd 252
#: (Debian 12) the first, with 257 (Debian 13) the second.
GONE = ("failed", "inactive")


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


@pytest.fixture
def units(public_path: Path, store: Path, mountpoint: Path) -> Path:
    """A directory with the unit, for two instances `old` and `new` on one mountpoint."""
    folder = public_path / "units"
    folder.mkdir()
    program = folder / "diffmergefs"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m diffmergefs "$@"\n')
    program.chmod(0o755)
    text = UNIT.read_text(encoding="utf-8")
    assert text.count(PROGRAM) == 1
    text = text.replace(PROGRAM, str(program)).replace("/etc/diffmergefs", str(folder))
    (folder / UNIT.name).write_text(text, encoding="utf-8")
    for name in ("old", "new"):
        options = f"--allow-other --state-dir={public_path}/state"
        (folder / f"{name}.conf").write_text(
            f"SOURCE={store}\nMOUNTPOINT={mountpoint}\nOPTIONS={options}\n"
        )
    return folder


@pytest.fixture
def manager(public_path: Path, units: Path) -> Iterator[Manager]:
    skips.require_fuse()
    with user_manager(public_path) as found:
        yield found


def test_systemd_finds_no_fault_in_the_unit(units: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(units / "diffmergefs@old.service")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_unit_has_no_end_by_force_and_no_namespace() -> None:
    settings = dict(re.findall(r"^(\w+)=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE))
    assert settings["Type"] == "notify"
    assert settings["TimeoutStopSec"] == "infinity"
    assert settings["SendSIGKILL"] == "no"
    assert settings["KillMode"] == "process"
    assert settings["OOMPolicy"] == "continue"
    assert "NotifyAccess" not in settings
    # What systemd.exec(5) says to set up a mount namespace.
    hides = re.compile("Protect|Private|ReadOnly|ReadWrite|Inaccessible|Root|Bind|Temporary|Mount")
    assert not [name for name in settings if hides.match(name)]


def test_a_stop_waits_for_the_vms_and_another_instance_takes_the_place(
    manager: Manager, mountpoint: Path
) -> None:
    old, new = "diffmergefs@old", "diffmergefs@new"
    image = mountpoint / "leaf" / "memory.bin"

    def names() -> list[str]:
        done = subprocess.run([*manager.enter, "ls", mountpoint], capture_output=True, text=True)
        return done.stdout.split()

    def is_shown(unit: str, state: str, status: str) -> bool:
        known = manager.shows(unit)
        return (known["ActiveState"], known["StatusText"]) == (state, status)

    assert manager.systemctl("start", old).returncode == 0, manager.systemctl("status", old)
    assert names() == ["base", "leaf"]  # it was ready when `start` returned
    with held(image, manager.enter) as holder:
        assert holder.read(0, PAGE) == signed(0, 0, PAGE)
        status = "serving 2 snapshots, 1 file open"
        until(lambda: is_shown(old, "active", status), "the status does not count")
        assert manager.systemctl("stop", "--no-block", old).returncode == 0
        status = "detached; 1 file open, serving until the last is closed"
        until(lambda: is_shown(old, "deactivating", status), "the stop is not told")
        until(lambda: names() == [], "it was not detached")
        assert holder.read(PAGE, PAGE) == signed(1, PAGE, PAGE)

        assert manager.systemctl("start", new).returncode == 0, manager.systemctl("status", new)
        assert names() == ["base", "leaf"]
        assert holder.read(2 * PAGE, PAGE) == signed(0, 2 * PAGE, PAGE)
        assert manager.shows(old)["SubState"] == "stop-sigterm"
    until(lambda: manager.shows(old)["ActiveState"] == "inactive", "it did not end")
    assert manager.shows(old)["Result"] == "success"
    assert names() == ["base", "leaf"]
    assert manager.systemctl("stop", new).returncode == 0
    known = manager.shows(new)
    assert (known["ActiveState"], known["Result"]) == ("inactive", "success")
    assert names() == []


def test_the_unit_lives_as_long_as_the_keeper_and_the_mount_longer(
    manager: Manager, mountpoint: Path
) -> None:
    unit = "diffmergefs@old"
    image = mountpoint / "leaf" / "memory.bin"

    def service() -> Service:
        command = [*manager.enter, "cat", f"{mountpoint}/.diffmergefs/{STATUS_FILE}"]
        return Status.from_json(subprocess.check_output(command, timeout=60)).service

    def has_failed_with(status: str) -> bool:
        known = manager.shows(unit)
        return (known["ActiveState"], known["ExecMainStatus"]) == ("failed", status)

    assert manager.systemctl("start", unit).returncode == 0, manager.systemctl("status", unit)
    first = service()
    if not first.covered:
        pytest.skip(skips.NO_RESEND)
    assert manager.shows(unit)["MainPID"] == str(first.keeper)
    with held(image, manager.enter) as holder:
        assert holder.read(0, PAGE) == signed(0, 0, PAGE)
        os.kill(first.server, signal.SIGKILL)
        assert holder.read(PAGE, PAGE) == signed(1, PAGE, PAGE)
        second = service()
        assert second.servers == 2
        known = manager.shows(unit)
        assert (known["ActiveState"], known["MainPID"]) == ("active", str(second.keeper))

        os.kill(second.keeper, signal.SIGKILL)
        until(lambda: has_failed_with("10"), "the start of another keeper was not refused")
        assert manager.shows(unit)["NRestarts"] == "1"
        assert not service().covered
        assert holder.read(2 * PAGE, PAGE) == signed(0, 2 * PAGE, PAGE)
    subprocess.run([*manager.enter, "umount", mountpoint], check=True, timeout=60)
    until(lambda: _is_gone(second.server), "the server did not end with its mount")
    assert manager.systemctl("start", unit).returncode == 0, manager.systemctl("status", unit)
    assert manager.systemctl("stop", unit).returncode == 0


def _is_gone(process: int) -> bool:
    # A zombie is: its parent is gone, and who adopted it may be slow.
    try:
        return Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_start_that_fails_is_a_failed_unit(manager: Manager, store: Path) -> None:
    store.rename(store.with_name("elsewhere"))
    assert manager.systemctl("start", "diffmergefs@old").returncode == 1
    assert manager.shows("diffmergefs@old")["ExecMainStatus"] == "14"


def test_a_unit_made_of_fstab_is_not_stopped_under_vms(
    manager: Manager, store: Path, mountpoint: Path, public_path: Path
) -> None:
    """systemd's umount is refused; after one by hand it leaves the daemon to the VMs."""
    namespace = Namespace(manager.pid)
    (public_path / "sbin").mkdir()
    namespace.make_writable("/sbin", public_path / "sbin")
    helper = Path(sys.executable).parent / "mount.fuse.diffmergefs"
    sbin = os.path.realpath("/sbin")
    namespace.run(["ln", "-sfT", helper, f"{sbin}/{helper.name}"], check=True)
    command: list[str | Path] = ["systemd-escape", "--path", "--suffix=mount", mountpoint]
    unit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    options = f"allow_other,_netdev,nofail,log={public_path}/log,state_dir={public_path}/state"
    (public_path / "units" / unit).write_text(
        f"[Mount]\nWhat={store}\nWhere={mountpoint}\nType=fuse.diffmergefs\nOptions={options}\n"
    )
    assert manager.systemctl("start", unit).returncode == 0, manager.systemctl("status", unit)
    with held(mountpoint / "leaf" / "memory.bin", manager.enter) as holder:
        assert holder.read(0, PAGE) == signed(0, 0, PAGE)
        assert manager.systemctl("stop", unit).returncode == 1
        assert manager.shows(unit)["SubState"] == "mounted"
        assert holder.read(PAGE, PAGE) == signed(1, PAGE, PAGE)
        assert namespace.run(["umount", "--lazy", mountpoint]).returncode == 0
        until(lambda: manager.shows(unit)["ActiveState"] in GONE, "it is not seen to be gone")
        assert holder.read(2 * PAGE, PAGE) == signed(0, 2 * PAGE, PAGE)
    until(lambda: _daemons(public_path) == [], "it did not end after the last VM")


def _daemons(folder: Path) -> list[str]:
    done = subprocess.run(["pgrep", "-f", f"log={folder}/log"], capture_output=True, text=True)
    return done.stdout.split()
