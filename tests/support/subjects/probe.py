"""What a test of a filesystem finds."""

from __future__ import annotations

from pathlib import Path

from diffmergefs.checks import probe
from diffmergefs.checks.diagnosis import Finding

CHECKS = ["filesystem", "grain", "zeros", "mappings", "reflink", "lease"]


def examined(folder: Path, page: int = 4096) -> dict[str, Finding]:
    findings = list(probe.examine_filesystem(str(folder), page))
    assert {finding.subject for finding in findings} == {str(folder)}
    for finding in findings:
        assert bool(finding.why) == bool(finding.remedy) == (finding.severity != "fine")
    return {finding.check: finding for finding in findings}
