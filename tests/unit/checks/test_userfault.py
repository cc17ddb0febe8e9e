"""Whether a VMM of this user can be served pages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.checks import userfault
from diffmergefs.checks.diagnosis import Finding


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this machine has is in files here; the user is an ordinary one."""
    for name in ("SYSCTL", "DEVICE", "HUGE_PAGES"):
        monkeypatch.setattr(userfault, name, str(tmp_path / name))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (tmp_path / "SYSCTL").write_text("0\n")
    (tmp_path / "HUGE_PAGES").mkdir()
    return tmp_path


def right() -> Finding:
    return next(iter(userfault.examine_userfault()))


def test_an_ordinary_user_needs_the_sysctl_or_the_device(machine: Path) -> None:
    found = right()
    assert (found.check, found.severity) == ("userfaultfd", "warning")
    assert "vm.unprivileged_userfaultfd=1" in str(found.remedy)
    (machine / "DEVICE").touch()
    assert right().severity == "fine" and str(machine / "DEVICE") in right().finding
    (machine / "DEVICE").unlink()
    (machine / "SYSCTL").write_text("1\n")
    assert right().finding == "every user may make a userfaultfd"


def test_root_needs_neither(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert right().severity == "fine" and "jailed Firecracker" in right().finding


def test_a_kernel_without_it_is_a_warning(machine: Path) -> None:
    (machine / "SYSCTL").unlink()
    assert right().severity == "warning"
    assert right().finding == "this kernel has no userfaultfd"


def test_free_huge_pages_are_counted(machine: Path) -> None:
    _, found = userfault.examine_userfault()
    assert (found.check, found.severity) == ("hugepages", "fine")
    assert found.finding.startswith("no 2 MiB page is free")
    (machine / "HUGE_PAGES" / "free_hugepages").write_text("17\n")
    _, found = userfault.examine_userfault()
    assert found.finding.startswith("17 pages of 2 MiB are free")
