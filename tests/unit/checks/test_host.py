"""What a mount needs of this machine, as root and as an ordinary user find it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.checks import host
from diffmergefs.checks.diagnosis import Finding
from diffmergefs.cli import doctor
from diffmergefs.system import asking
from tests.support import mounttable, skips
from tests.support.commands import succeed


@pytest.fixture(scope="session")
def root() -> None:
    skips.require_root()


@pytest.fixture(autouse=True)
def as_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


def found(check: str) -> Finding:
    (finding,) = (f for f in host.examine_host() if f.check == check)
    assert finding.subject == "host"
    assert bool(finding.why) == bool(finding.remedy) == (finding.severity != "fine")
    return finding


def test_every_part_of_the_machine_is_looked_at_once() -> None:
    checks = [finding.check for finding in host.examine_host()]
    assert checks == ["kernel", "device", "helper", "right", "allow_other", "fusectl", "pyfuse3"]


def test_the_kernel_is_named() -> None:
    assert found("kernel") == Finding("host", "kernel", "fine", f"Linux {platform.release()}")


def test_an_old_kernel_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "4.9.0-8-amd64")
    assert found("kernel").severity == "warning"
    monkeypatch.setattr(platform, "release", lambda: "4.14.1")
    assert found("kernel").severity == "fine"


def test_another_system_than_linux_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert (found("kernel").severity, found("kernel").finding) == ("wrong", "this is darwin")


def test_the_device_can_be_opened() -> None:
    skips.require_fuse()
    assert found("device").severity == "fine"


def test_a_device_that_is_missing_or_closed_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host, "FUSE_DEVICE", str(tmp_path / "fuse"))
    assert found("device").finding == f"no {tmp_path}/fuse"
    (tmp_path / "fuse").mkdir()
    closed = found("device")
    assert (closed.severity, closed.finding) == ("warning", f"{tmp_path}/fuse: Is a directory")
    monkeypatch.setattr(host, "FUSE_DEVICE", os.devnull)
    assert found("device").finding == f"{os.devnull} is another device"


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("mode", "uid", "severity", "text"),
    [
        (None, 0, "warning", "no fusermount3 in $PATH"),
        (0o755, 0, "warning", "{} is not setuid root"),
        (0o4755, 1, "warning", "{} is not setuid root"),
        (0o4755, 0, "fine", "{} mounts for ordinary users"),
    ],
)
def test_fusermount3(
    mode: int | None,
    uid: int,
    severity: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    helper = tmp_path / "fusermount3"
    if mode is not None:
        helper.touch()
        os.chown(helper, uid, 0)
        helper.chmod(mode)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (found("helper").severity, found("helper").finding) == (severity, text.format(helper))


def test_root_needs_no_helper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "ROOTS_PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert found("helper").severity == "fine" and "without" in found("helper").finding


def test_fuse_conf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    conf = tmp_path / "fuse.conf"
    monkeypatch.setattr(host, "FUSE_CONF", str(conf))
    assert found("allow_other").severity == "warning"
    conf.write_text("#user_allow_other\n", encoding="utf-8")
    assert found("allow_other").severity == "warning"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert found("allow_other").finding == "root may mount with --allow-other"
    conf.write_text("mount_max = 10\nuser_allow_other\n", encoding="utf-8")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert found("allow_other").severity == "fine"


def test_fusectl_is_looked_for_where_the_kernel_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host, "CONNECTIONS", "/proc")  # a mount that every machine has
    assert found("fusectl").severity == "fine"
    for place in (tmp_path, tmp_path / "none"):
        monkeypatch.setattr(host, "CONNECTIONS", str(place))
        missing = found("fusectl")
        assert (missing.severity, str(place) in missing.remedy) == ("warning", True)
        assert "--prefetch=fadvise" in missing.why and "--max-background" in missing.why


def test_the_library_can_be_imported() -> None:
    finding = found("pyfuse3")
    assert finding.severity == "fine" and finding.finding.startswith("pyfuse3 3.")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["false"], "exit status 1"),
        (["sh", "-c", "echo Traceback; echo 'ImportError: libfuse3.so.3' >&2; exit 1"], "libfuse3"),
        (["/does/not/exist"], "No such file"),
    ],
)
def test_a_library_that_cannot_be_imported_is_a_warning(
    command: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = subprocess.Popen

    def instead(_: Any, **options: Any) -> Any:
        return start(command, **options)

    monkeypatch.setattr(subprocess, "Popen", instead)
    finding = found("pyfuse3")
    assert finding.severity == "warning" and said in finding.finding


def test_the_right_to_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("right").severity == "fine" and "ordinary user" in found("right").finding
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for may, severity in ((True, "fine"), (False, "warning")):
        monkeypatch.setattr(host, "_may_administer", lambda may=may: may)
        assert found("right").severity == severity and "CAP_SYS_ADMIN" in found("right").finding


WITHOUT_THE_RIGHT = ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-m", "diffmergefs"]


@pytest.mark.usefixtures("root")
def test_doctor_tries_the_act(tmp_path: Path) -> None:
    skips.require_fuse()
    if not skips.may_mount():
        pytest.skip(skips.NO_MOUNTS)
    assert "  fine     a view was mounted and read" in succeed("doctor").splitlines()
    done = subprocess.run(
        [*WITHOUT_THE_RIGHT, "doctor", "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    findings = {each["check"]: each for each in json.loads(done.stdout)}
    assert findings["right"]["severity"] == "warning"
    assert findings["mount"]["severity"] == "wrong"
    assert "a view cannot be mounted: " in findings["mount"]["finding"]
    assert "without CAP_SYS_ADMIN" in findings["mount"]["finding"]


@pytest.mark.usefixtures("root")
def test_the_act_is_seen_by_nobody_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skips.require_fuse()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    seen = []

    def looking(question: Callable[[], bytes]) -> bytes:
        seen.append([entry.path for entry in mounttable.entries()])
        return asking.ask(question)

    monkeypatch.setattr(doctor, "ask", looking)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert doctor.try_mount().severity == "fine"
    assert not [path for path in seen[0] if path.startswith(str(tmp_path))]
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("wrong", ["other bytes", "no answer"])
def test_a_view_that_is_not_what_it_should_be_is_wrong(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skips.require_fuse()
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def answer(question: Callable[[], bytes]) -> bytes:
        if wrong == "no answer":
            raise TimeoutError("no answer")
        return b"x"

    monkeypatch.setattr(doctor, "ask", answer)
    assert doctor.try_mount().severity == "wrong"


@pytest.mark.usefixtures("root")
def test_a_mount_that_fails_names_only_what_is_amiss(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "base").write_bytes(bytes(4096))
    command = [*WITHOUT_THE_RIGHT, "mount", "--base", str(tmp_path / "base"), str(tmp_path / "mnt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 11
    line = done.stderr.splitlines()[-1]
    assert "root without CAP_SYS_ADMIN" in line and "/dev/fuse there" not in line
