"""What the examination of a host finds."""

from __future__ import annotations

from diffmergefs.checks import host
from diffmergefs.checks.diagnosis import Finding


def found(check: str) -> Finding:
    """The finding of this check, of which there is one."""
    (finding,) = (f for f in host.examine_host() if f.check == check)
    assert finding.subject == "host"
    assert bool(finding.why) == bool(finding.remedy) == (finding.severity != "fine")
    return finding
