"""What a mount needs of this machine, as root and as an ordinary user find it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.checks import host
from diffmergefs.checks.diagnosis import Finding
from diffmergefs.system import mountpoint
from tests.support.subjects.host import found


@pytest.fixture(autouse=True)
def as_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


def test_every_part_of_the_machine_is_looked_at_once() -> None:
    checks = [finding.check for finding in host.examine_host()]
    assert checks == [
        *("kernel", "cover", "device", "helper", "right", "allow_other", "fusectl", "pyfuse3")
    ]


def test_the_kernel_is_named() -> None:
    assert found("kernel") == Finding("host", "kernel", "fine", f"Linux {platform.release()}")


def test_an_old_kernel_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "4.9.0-8-amd64")
    assert found("kernel").severity == "warning"
    monkeypatch.setattr(platform, "release", lambda: "4.14.1")
    assert found("kernel").severity == "fine"


@pytest.mark.parametrize(
    ("release", "severity"),
    [
        ("6.1.0-18-amd64", "warning"),
        ("6.8.0-31-generic", "warning"),
        ("6.9.0", "fine"),
        ("6.12.48+deb13-amd64", "fine"),
        ("7.0.0-rc1", "fine"),
        ("odd", "fine"),
    ],
)
def test_a_kernel_that_covers_no_dead_server_is_a_warning(
    release: str, severity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    finding = found("cover")
    assert finding.severity == severity
    assert ("6.9" in finding.remedy and release in finding.finding) is (severity == "warning")


def test_another_system_than_linux_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert (found("kernel").severity, found("kernel").finding) == ("wrong", "this is darwin")


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


def test_root_needs_no_helper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "ROOTS_PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert found("helper").severity == "fine" and "without" in found("helper").finding


def test_fuse_conf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    conf = tmp_path / "fuse.conf"
    monkeypatch.setattr(mountpoint, "FUSE_CONF", str(conf))
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
        assert "--max-background" in missing.why


@pytest.mark.parametrize(("release", "replaced"), [("6.8.0", True), ("6.9.0", False)])
def test_without_fusectl_an_old_kernel_gets_another_way_to_prefetch(
    release: str, replaced: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host, "CONNECTIONS", str(tmp_path))
    monkeypatch.setattr(platform, "release", lambda: release)
    assert ("--prefetch=fadvise" in found("fusectl").why) is replaced


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
