"""Findings of doctor on filesystems and layers, and the store it examines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffmergefs.checks import doctor
from diffmergefs.checks.diagnosis import Finding
from diffmergefs.checks.doctor import examine_path
from diffmergefs.opening.trust import TrustPolicy
from tests.support.stores import write_chain

OF_FILESYSTEMS = {
    *("filesystem", "grain", "zeros", "mappings", "reflink", "lease", "probe", "snapshots"),
}


def examined(path: Path, **options: Any) -> list[Finding]:
    """The findings but for those on the filesystem, which is fine."""
    found = list(examine_path(str(path), TrustPolicy(**options)))
    for finding in found:
        assert bool(finding.why) == bool(finding.remedy) == (finding.severity != "fine")
    folder = str(path if path.is_dir() else path.parent)
    probed = [f for f in found if f.subject == folder and f.check in OF_FILESYSTEMS]
    assert len(probed) >= 5 and {f.severity for f in probed} == {"fine"}
    return [f for f in found if f not in probed]


def of(found: list[Finding], path: Path) -> list[tuple[str, str]]:
    return [(f.check, f.severity) for f in found if f.subject == str(path)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_chain(tmp_path / "store", ["base", "work", "leaf"])


def memory(store: Path, tag: str) -> Path:
    return store / tag / "memory.bin"


CHECKS = ["filesystem", "grain", "zeros", "mappings", "reflink", "lease"]


def probed(folder: Path, page: int = 4096) -> dict[str, Finding]:
    findings = list(doctor.examine_filesystem(str(folder), page))
    assert {finding.subject for finding in findings} == {str(folder)}
    for finding in findings:
        assert bool(finding.why) == bool(finding.remedy) == (finding.severity != "fine")
    return {finding.check: finding for finding in findings}
